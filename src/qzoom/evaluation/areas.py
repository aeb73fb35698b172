"""How large what a question is about is: the share of the picture under the tight box around its places, in bins.

Pure arithmetic. The bins are spaced about evenly on a logarithmic scale, since small things are what zooming is for.
"""

from __future__ import annotations

from collections.abc import Sequence

from qzoom.images.geometry import box_area_px, clip_box
from qzoom.types import Box

__all__ = ["AREA_BINS", "area_bin", "area_share", "around"]

_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1)
AREA_BINS = ("<0.1%", "0.1-0.3%", "0.3-1%", "1-3%", "3-10%", ">=10%")
"""Names of the bins, smallest first; an upper edge belongs to the next bin."""


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of at least one box."""
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def area_share(boxes: Sequence[Box], size_px: tuple[int, int]) -> float:
    """Share of a picture that the box around all boxes covers; parts outside the picture do not count.

    Args:
        boxes: at least one.
        size_px: (width, height); a picture without pixels gives 0.
    """
    pixels = size_px[0] * size_px[1]
    return box_area_px(clip_box(around(boxes), size_px)) / pixels if pixels else 0.0


def area_bin(share: float) -> str:
    """The bin of a share, one of `AREA_BINS`."""
    return AREA_BINS[sum(share >= edge for edge in _EDGES)]
