"""What teachers see of a region: the box with a margin, cut out and enlarged.

Twice the size is the paper's choice (arXiv 2602.11858); it is bounded by what a teacher's visual tokens can show.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qzoom.config import check_count, check_range
from qzoom.distill.items import Item, Picture
from qzoom.errors import DataError
from qzoom.images.geometry import box_area_px, clip_box
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CropSettings", "CropStep", "crop_box", "crop_scale", "cut"]


@dataclass(frozen=True, slots=True)
class CropSettings:
    """How a region becomes a crop.

    Args:
        margin: share of the box's width and height added on each side.
        min_width_px: narrower crops grow about their centre, as far as the picture goes.
        min_height_px: likewise.
        scale: by how much crops are enlarged.
        max_pixels: most pixels of an enlarged crop; larger ones are enlarged less, or made smaller.
        max_tokens: most visual tokens of it.
        token_px: side of one visual token in pixels.

    Raises:
        ConfigError: a value out of range.
    """

    margin: float = 0.1
    min_width_px: int = 56
    min_height_px: int = 56
    scale: float = 2.0
    max_pixels: int = 1_000_000
    max_tokens: int = 1024
    token_px: int = 28

    def __post_init__(self) -> None:
        check_range(self, "margin", 0, 10)
        check_range(self, "scale", 0.1, 16)
        check_count(self, "min_width_px", 1, 100_000)
        check_count(self, "min_height_px", 1, 100_000)
        check_count(self, "max_pixels", 1, 100_000_000)
        check_count(self, "max_tokens", 1, 1_000_000)
        check_count(self, "token_px", 1, 1024)


@dataclass(frozen=True, slots=True)
class CropStep:
    """Fills in a region's `crop_box` and `scale`; see `qzoom.distill.items.Step`."""

    settings: CropSettings
    name: str = "crop"

    def __call__(self, item: Item) -> tuple[Item, ...]:
        """The item with its crop.

        Raises:
            DataError: it has no region, or its region has no pixels on the picture.
        """
        if item.region is None:
            raise DataError("no region to crop")
        box = crop_box(item.region.box, item.picture, self.settings)
        if box_area_px(box) == 0:
            raise DataError("the box lies outside the picture")
        region = dataclasses.replace(item.region, crop_box=box, scale=crop_scale(box, self.settings))
        return (dataclasses.replace(item, region=region).decide(self.name, True),)


def crop_box(box: Box4, picture: Picture, settings: CropSettings) -> Box4:
    """The box with its margin and least size, clipped to the picture; one outside has no area."""
    size_px = (picture.width, picture.height)
    x0, y0, x1, y1 = clip_box(box, size_px)
    if x1 <= x0 or y1 <= y0:
        return x0, y0, x0, y0
    left, right = _grown(x0, x1, settings.margin, settings.min_width_px, picture.width)
    top, bottom = _grown(y0, y1, settings.margin, settings.min_height_px, picture.height)
    return left, top, right, bottom


def crop_scale(box: Box4, settings: CropSettings) -> float:
    """How much a crop is enlarged within the limits, to four decimals."""
    most = min(settings.max_pixels, settings.max_tokens * settings.token_px**2)
    return math.floor(min(settings.scale, math.sqrt(most / box_area_px(box))) * 1e4) / 1e4


def cut(image: Image, box: Box4, scale: float) -> Image:
    """The box's pixels, resized by `scale` (Lanczos); sides are at least 1 px.

    Args:
        image: the whole picture, RGB.
        box: inside the picture, with area.
        scale: 2.0 doubles both sides.
    """
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
