"""Which proposed boxes are kept: inside an area band, large enough to see, few of each size, none twice.

Sizes are drawn from bins of equal ratio between the band's ends, so that small and less small regions both come. Pure
arithmetic; every box that is left out has its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qzoom.config import check_count, check_range
from qzoom.errors import ConfigError
from qzoom.images.geometry import box_area_px, clip_box
from qzoom.store.schema import Box4

__all__ = ["Chosen", "SelectSettings", "area_bin", "iou", "select"]


@dataclass(frozen=True, slots=True)
class SelectSettings:
    """Limits of what is kept.

    Args:
        min_share: smallest share of the picture's area.
        max_share: largest share; 0.1 is the paper's.
        bins: size bins of equal ratio inside the band.
        per_bin: most boxes of a bin.
        per_picture: most boxes of a picture, taken from the bins in turn.
        min_side_px: shortest side of a box.
        min_tokens: fewest visual tokens that its pixels make.
        token_px: side of one visual token in pixels.
        max_overlap: a box whose intersection over union with a better one is above this is left out.
        max_aspect: longest side over shortest side, at most.

    Raises:
        ConfigError: a value out of range, or a band without room.
    """

    min_share: float = 1e-5
    max_share: float = 0.1
    bins: int = 3
    per_bin: int = 4
    per_picture: int = 8
    min_side_px: int = 12
    min_tokens: float = 1.0
    token_px: int = 28
    max_overlap: float = 0.5
    max_aspect: float = 20.0

    def __post_init__(self) -> None:
        check_range(self, "min_share", 1e-9, 1)
        check_range(self, "max_share", 1e-9, 1)
        for name in ("bins", "per_bin", "per_picture", "min_side_px", "token_px"):
            check_count(self, name, 1, 10_000)
        check_range(self, "min_tokens", 0, 1e6)
        check_range(self, "max_overlap", 0, 1)
        check_range(self, "max_aspect", 1, 1e4)
        if self.min_share >= self.max_share:
            raise ConfigError(
                f"propose.select: min_share {self.min_share} leaves no room below max_share {self.max_share}."
            )


@dataclass(frozen=True, slots=True)
class Chosen:
    """What became of one proposed box.

    Args:
        index: of the box in what was proposed.
        box: clipped to the picture.
        area_bin: its size bin, 0 the smallest; 0 also outside the band.
        reason: why it was left out; "" for one that is kept.
    """

    index: int
    box: Box4
    area_bin: int
    reason: str


def select(
    boxes: Sequence[Box4], scores: Sequence[float], size_px: tuple[int, int], settings: SelectSettings
) -> list[Chosen]:
    """What becomes of each box.

    Args:
        boxes: xyxy in original pixels, as proposed.
        scores: the better first; of equal ones the earlier.
        size_px: (width, height) of the picture.
        settings: the limits.

    Returns:
        One result per box, in the order of `boxes`.
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
    return [
        Chosen(index, box, place, reason)
        for index, (box, place, reason) in enumerate(zip(clipped, bins, reasons, strict=True))
    ]


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
    """What is left over when `most` are taken from the queues in turn."""
    turns = [(place, number, index) for number, queue in enumerate(queues) for place, index in enumerate(queue)]
    return [index for _, _, index in sorted(turns)[most:]]
