"""Crops: a box with its margin, cut out of the image and enlarged.

Enlarging twice is the paper's choice (arXiv 2602.11858), limited by the visual tokens of the model that sees the crop.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from qzoom.images.geometry import box_area_px, clip_box
from qzoom.settings import Between, settings
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image


@settings
class CropSettings:
    """How a box becomes a crop."""

    margin: Annotated[float, Between(0, 10)] = 0.1
    """Share of the box's width and height added on each side."""
    min_width_px: Annotated[int, Between(1, 100_000)] = 56
    """Narrower crops grow about their centre, as far as the image allows."""
    min_height_px: Annotated[int, Between(1, 100_000)] = 56
    """Lower crops grow about their centre, as far as the image allows."""
    scale: Annotated[float, Between(0.1, 16)] = 2.0
    """Enlargement of the crop."""
    max_pixels: Annotated[int, Between(1, 100_000_000)] = 1_000_000
    """Most pixels of an enlarged crop; larger crops are enlarged less, or scaled down."""
    max_tokens: Annotated[int, Between(1, 1_000_000)] = 1024
    """Most visual tokens of an enlarged crop."""
    token_px: Annotated[int, Between(1, 1024)] = 28
    """Side of one visual token in pixels."""


def crop_box(box: Box4, size_px: tuple[int, int], settings: CropSettings) -> Box4:
    """The box with its margin and minimum size, clipped to the image; a box outside has no area."""
    x0, y0, x1, y1 = clip_box(box, size_px)
    if x1 <= x0 or y1 <= y0:
        return x0, y0, x0, y0
    left, right = _grown(x0, x1, settings.margin, settings.min_width_px, size_px[0])
    top, bottom = _grown(y0, y1, settings.margin, settings.min_height_px, size_px[1])
    return left, top, right, bottom


def crop_scale(box: Box4, settings: CropSettings) -> float:
    """Enlargement of a crop within the limits, to four decimals."""
    most = min(settings.max_pixels, settings.max_tokens * settings.token_px**2)
    return math.floor(min(settings.scale, math.sqrt(most / box_area_px(box))) * 1e4) / 1e4


def cut(image: Image, box: Box4, scale: float) -> Image:
    """The box's pixels, resized by `scale` (Lanczos); sides are at least 1 px."""
    from PIL.Image import Resampling

    crop = image.crop(box)
    size_px = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    return crop if size_px == crop.size else crop.resize(size_px, Resampling.LANCZOS)


def _grown(low: int, high: int, margin: float, least: int, side: int) -> tuple[int, int]:
    """An interval with its margin and least length, moved inside 0 to `side`."""
    grow = max(math.ceil((high - low) * margin), math.ceil((least - (high - low)) / 2), 0)
    low, high = low - grow, high + grow
    if low < 0:
        high = min(side, max(high, min(least, side)))
        low = 0
    if high > side:
        low = max(0, min(low, side - least))
        high = side
    return low, high
