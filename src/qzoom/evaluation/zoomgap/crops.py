"""The region of a question as a picture of its own: cut out with a declared margin, enlarged by a declared factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qzoom.distill.overlay import with_margin
from qzoom.errors import DataError
from qzoom.evaluation.areas import around
from qzoom.evaluation.zoomgap.settings import GapSettings
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["crop", "enlargement", "region_of"]


def region_of(boxes: Sequence[Box], size_px: tuple[int, int], margin: float) -> Box:
    """The region that holds all places of an answer, with its margin, inside the picture.

    Args:
        boxes: at least one, in original pixels.
        size_px: (width, height).
        margin: share of the region's own sides, added on every side.

    Raises:
        DataError: no box, or a region that is empty or outside the picture.
    """
    if not boxes:
        raise DataError("The question has no box, so there is no region to cut out.")
    return with_margin(around(boxes), size_px, margin)


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
    from PIL import Image

    cut = image.crop(region)
    factor = enlargement(cut.size, settings, cell_px)
    size = (max(1, round(cut.width * factor)), max(1, round(cut.height * factor)))
    return cut if size == cut.size else cut.resize(size, Image.Resampling.LANCZOS)
