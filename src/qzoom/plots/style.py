"""Colours, sizes and fonts of all figures: one palette, one typeface, one grid.

Sizes are pixels of the finished figure, which is drawn for dense displays (1800 px wide, read at about half that).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont

from qzoom.errors import QZoomError

__all__ = [
    "ACCENTS",
    "CARD",
    "COARSE",
    "FIGURE_WIDTH_PX",
    "GAP_PX",
    "HAIRLINE",
    "HEAT",
    "INK",
    "MARGIN_PX",
    "MUTED",
    "PAPER",
    "RADIUS_PX",
    "TRACK",
    "Colour",
    "font",
    "font_folder",
]

Colour = tuple[int, int, int]

PAPER: Colour = (247, 247, 245)
CARD: Colour = (255, 255, 255)
INK: Colour = (24, 28, 36)
MUTED: Colour = (98, 105, 118)
HAIRLINE: Colour = (222, 224, 228)
TRACK: Colour = (233, 235, 239)
COARSE: Colour = (71, 98, 140)
ACCENTS: tuple[Colour, ...] = ((222, 84, 38), (24, 138, 118), (128, 78, 196), (196, 138, 12))
HEAT: tuple[Colour, ...] = ((255, 214, 102), (255, 150, 46), (224, 58, 62))  # low, middle, high

FIGURE_WIDTH_PX = 1800
MARGIN_PX = 64
GAP_PX = 52
RADIUS_PX = 14

_FILES = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}


@lru_cache(maxsize=1)
def font_folder() -> Path:
    """The folder of the fonts that come with matplotlib, found without importing it.

    Raises:
        QZoomError: matplotlib is not installed.
    """
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise QZoomError("Figures need matplotlib's fonts and matplotlib is missing; install it with pip.")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=64)
def font(size_px: int, weight: str = "regular") -> ImageFont.FreeTypeFont:
    """The typeface at a size.

    Args:
        size_px: em size in pixels.
        weight: "regular" or "bold".
    """
    return ImageFont.truetype(str(font_folder() / _FILES[weight]), size_px)
