"""The region of a question as a picture of its own: cut out with a declared margin, enlarged by a declared factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qzoom.distill.crop import CropSettings, crop_box, cut
from qzoom.distill.records import Picture
from qzoom.errors import DataError
from qzoom.evaluation.areas import around
from qzoom.evaluation.zoomgap.settings import GapSettings
from qzoom.images.geometry import box_area_px
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["crop", "enlargement", "region_of"]


def region_of(boxes: Sequence[Box], size_px: tuple[int, int], settings: GapSettings) -> Box:
    """The region that holds all places of an answer, cut as the teachers of `qzoom distill` see it.

    Args:
        boxes: at least one, in original pixels.
        size_px: (width, height) of the picture.
        settings: margin and least size.

    Raises:
        DataError: no box, or a region that is empty or outside the picture.
    """
    if not boxes:
        raise DataError("The question has no box, so there is no region to cut out.")
    least = settings.crop_min_px
    rule = CropSettings(settings.crop_margin, min_width_px=least, min_height_px=least)
    region = crop_box(around(boxes), Picture("", "", *size_px), rule)
    if box_area_px(region) == 0:
        raise DataError(f"The box {around(boxes)!r} has no pixels on the picture of {size_px[0]} x {size_px[1]} px.")
    return region


def enlargement(size_px: tuple[int, int], settings: GapSettings, cell_px: int) -> float:
    """By how much a crop's sides grow.

    With "fit" until its cells number the limit; a crop that is larger already stays as it is, since the model's own
    resizing brings it down.

    Args:
        size_px: (width, height) of the crop.
        settings: scale and limit.
        cell_px: side of the square of pixels that one visual token covers.
    """
    if isinstance(settings.crop_scale, str):
        pixels = settings.max_visual_tokens * cell_px**2
        return max(1.0, math.sqrt(pixels / (size_px[0] * size_px[1])))
    return float(settings.crop_scale)


def crop(image: PIL.Image.Image, region: Box, settings: GapSettings, cell_px: int) -> PIL.Image.Image:
    """Cut a region out and enlarge it.

    Args:
        image: RGB.
        region: inside the picture.
        settings: scale and limit.
        cell_px: see `enlargement`.
    """
    return cut(image, region, enlargement((region[2] - region[0], region[3] - region[1]), settings, cell_px))
