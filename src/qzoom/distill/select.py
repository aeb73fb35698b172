"""Which proposed boxes are kept: inside an area band, large enough to see, few of each size, no duplicates.

Sizes are drawn from bins of equal ratio between the ends of the band, so that small and less small targets both come.
Pure arithmetic; every box that is left out has a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from qzoom.errors import ConfigError
from qzoom.images.geometry import box_area_px, clip_box
from qzoom.settings import Between, Share, settings
from qzoom.store.schema import Box4

Count = Annotated[int, Between(1, 10_000)]
AreaShare = Annotated[float, Between(1e-9, 1)]


@settings
class SelectSettings:
    """Limits of the boxes that are kept."""

    min_share: AreaShare = 1e-5
    """Smallest share of the image's area."""
    max_share: AreaShare = 0.1
    """Largest share of the image's area; 0.1 is the paper's."""
    bins: Count = 3
    """Size bins of equal ratio inside the band."""
    per_bin: Count = 4
    """Most boxes of a bin."""
    per_picture: Count = 8
    """Most boxes of an image, taken from the bins in turn."""
    min_side_px: Count = 12
    """Shortest side of a box."""
    min_tokens: Annotated[float, Between(0, 1e6)] = 1.0
    """Fewest visual tokens that its pixels make."""
    token_px: Count = 28
    """Side of one visual token in pixels."""
    max_overlap: Share = 0.5
    """A box whose intersection over union with a better one is above this is left out."""
    max_aspect: Annotated[float, Between(1, 1e4)] = 20.0
    """Longest side over shortest side, at most."""

    def __post_init__(self) -> None:
        if self.min_share >= self.max_share:
            raise ConfigError(f"min_share {self.min_share} leaves no room below max_share {self.max_share}.")


def select(
    boxes: Sequence[Box4], scores: Sequence[float], size_px: tuple[int, int], settings: SelectSettings
) -> list[tuple[Box4, int, str]]:
    """Decide about each box.

    Args:
        boxes: xyxy in original pixels, as proposed.
        scores: the better first; of equal ones the earlier.
        size_px: (width, height) of the image.
        settings: the limits.

    Returns:
        Of each box, in order: the box clipped to the image, its size bin (0 the smallest; 0 also outside the band), and
        why it is left out ("" for one that is kept).
    """
    clipped = [clip_box(box, size_px) for box in boxes]
    reasons = [_unfit(box, size_px, settings) for box in clipped]
    bins = [0 if reason else area_bin(box, size_px, settings) for box, reason in zip(clipped, reasons, strict=True)]
    queues: list[list[int]] = [[] for _ in range(settings.bins)]
    kept: list[int] = []
    for index in sorted((i for i, reason in enumerate(reasons) if not reason), key=lambda i: (-scores[i], i)):
        if any(iou(clipped[index], clipped[other]) > settings.max_overlap for other in kept):
            reasons[index] = "overlaps a better one"
            continue
        kept.append(index)
        queue = queues[bins[index]]
        if len(queue) == settings.per_bin:
            reasons[index] = "enough of its size"
        else:
            queue.append(index)
    for index in _beyond(queues, settings.per_picture):
        reasons[index] = "enough of this picture"
    return list(zip(clipped, bins, reasons, strict=True))


def area_bin(box: Box4, size_px: tuple[int, int], settings: SelectSettings) -> int:
    """The size bin of a box inside the band."""
    share = box_area_px(box) / (size_px[0] * size_px[1])
    span = math.log(settings.max_share / settings.min_share)
    return min(settings.bins - 1, max(0, int(settings.bins * math.log(share / settings.min_share) / span)))


def iou(a: Box4, b: Box4) -> float:
    """Intersection over union of two boxes; 0 without area."""
    common = box_area_px((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area_px(a) + box_area_px(b) - common
    return common / union if union else 0.0


def _unfit(box: Box4, size_px: tuple[int, int], settings: SelectSettings) -> str:
    """Why a clipped box cannot be used by itself; "" when it can."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return "outside the picture"
    share = width * height / (size_px[0] * size_px[1])
    if share < settings.min_share:
        return "smaller than the area band"
    if share > settings.max_share:
        return "larger than the area band"
    if min(width, height) < settings.min_side_px:
        return "too few pixels"
    if width * height < settings.min_tokens * settings.token_px**2:
        return "too few visual tokens"
    if max(width, height) > settings.max_aspect * min(width, height):
        return "too long and thin"
    return ""


def _beyond(queues: list[list[int]], most: int) -> list[int]:
    """Indices left over when `most` are taken from the queues in turn."""
    turns = [(turn, number, index) for number, queue in enumerate(queues) for turn, index in enumerate(queue)]
    return [index for _, _, index in sorted(turns)[most:]]
