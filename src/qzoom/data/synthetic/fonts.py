"""Typefaces for the synthetic renderers.

matplotlib, a dependency, ships DejaVu, STIX and Computer Modern: these make up the `core` set, which every held-out
picture uses, so that anyone can remake it. The `train` set adds Roboto and Source Sans when their packages are
installed (extra `train`).
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ImageFont

__all__ = ["FontSet", "advances", "font_paths", "load_font"]

FontSet = Literal["core", "train"] | tuple[str, ...]
"""A named set of typefaces, or the paths of the faces to use."""

_CORE = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)
_EXTRA = {
    "font_roboto": ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf", "Roboto-Light.ttf"),
    "font_source_sans_pro": ("SourceSansPro-Regular.ttf", "SourceSansPro-Semibold.ttf", "SourceSansPro-Bold.ttf"),
}


@lru_cache(maxsize=4)
def font_paths(font_set: FontSet = "core") -> tuple[str, ...]:
    """Paths of the typefaces of a set, in a fixed order; the `train` set holds only what is installed."""
    if isinstance(font_set, tuple):
        return font_set
    import matplotlib

    base = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [base / name for name in _CORE]
    if font_set == "train":
        for package, names in _EXTRA.items():
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                paths += [Path(spec.origin).parent / "files" / name for name in names]
    return tuple(str(path) for path in paths if path.is_file())


@lru_cache(maxsize=2048)
def load_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    """The face at an em size in pixels, loaded once; basic layout, so that advances do not depend on the machine."""
    return ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=200_000)
def _advance(path: str, size_px: int, char: str) -> float:
    return float(load_font(path, size_px).getlength(char))


def advances(path: str, size_px: int, text: str) -> np.ndarray:
    """Advance widths of the characters of `text` in pixels, float32, kerning left aside."""
    return np.array([_advance(path, size_px, char) for char in text], dtype=np.float32)
