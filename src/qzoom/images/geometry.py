"""Pure arithmetic of visual-token grids and boxes; no pixels, no tensors.

`fit_grid` decides how many visual tokens a picture or a crop takes (method.md 1 and 4: coarse view, region look). The
box helpers serve heads, labels, figures and evaluation. Boxes are xyxy in original pixels, half-open.
"""

from __future__ import annotations

import math

from qzoom.config import TokenBudget
from qzoom.errors import ImageError
from qzoom.types import Box


def fit_grid(width_px: int, height_px: int, token_px: int, budget: TokenBudget) -> tuple[int, int]:
    """Rows and columns of visual tokens for a picture, within a budget and near its aspect ratio.

    Where the usual resizing of the Qwen-VL processors ends within the limits, this is its result. Where it does not (a
    strip longer than the budget, limits that lie close together), the grid with the nearest aspect ratio within the
    limits is taken instead.

    Args:
        token_px: side of one visual token in resized pixels.
        budget: limits on rows x columns, both inclusive.

    Returns:
        (rows, columns), both at least 1; the resized picture is (columns x token_px, rows x token_px).

    Raises:
        ImageError: a side below 1.
    """
    if width_px < 1 or height_px < 1 or token_px < 1:
        raise ImageError(
            f"A picture of {width_px} x {height_px} px has no pixels to look at; give both sides 1 or more."
        )
    # The processors work in pixels, in floating point; the same order of operations gives the same rounding.
    rows, columns = round(height_px / token_px), round(width_px / token_px)
    area_px, cell_area_px = width_px * height_px, token_px * token_px
    if rows * columns > budget.max_tokens:
        shrink = math.sqrt(area_px / (budget.max_tokens * cell_area_px))
        rows = max(1, math.floor(height_px / shrink / token_px))
        columns = max(1, math.floor(width_px / shrink / token_px))
    elif rows * columns < budget.min_tokens:
        stretch = math.sqrt(budget.min_tokens * cell_area_px / area_px)
        rows, columns = math.ceil(height_px * stretch / token_px), math.ceil(width_px * stretch / token_px)
    if budget.min_tokens <= rows * columns <= budget.max_tokens:
        return rows, columns
    return _nearest_grid(width_px, height_px, token_px, budget)


def _nearest_grid(width_px: int, height_px: int, token_px: int, budget: TokenBudget) -> tuple[int, int]:
    """The grid within the limits whose aspect ratio is nearest; of equal ones, the one nearest the native size."""
    long_px, short_px = max(width_px, height_px), min(width_px, height_px)
    aspect = long_px / short_px
    native = width_px * height_px / (token_px * token_px)
    target = min(max(native, budget.min_tokens), budget.max_tokens)
    best, best_cost = (1, budget.max_tokens), (math.inf, math.inf)
    for short in range(1, math.isqrt(budget.max_tokens) + 1):
        lowest, highest = -(-budget.min_tokens // short), budget.max_tokens // short
        if lowest > highest:
            continue
        long = min(max(round(short * aspect), lowest), highest)
        cost = (round(abs(math.log(long / short / aspect)), 9), abs(short * long - target))
        if cost < best_cost:
            best, best_cost = (short, long), cost
    short, long = best
    return (short, long) if width_px >= height_px else (long, short)


def clip_box(box: Box, size_px: tuple[int, int]) -> Box:
    """The part of a box that lies on a picture; a box outside becomes one of area 0 on the nearest edge."""
    width, height = size_px
    x0, y0 = min(max(box[0], 0), width), min(max(box[1], 0), height)
    return x0, y0, min(max(box[2], x0), width), min(max(box[3], y0), height)


def box_area_px(box: Box) -> int:
    """Pixels in a box; 0 for an inverted one."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def contains(outer: Box, inner: Box) -> bool:
    """Whether every pixel of `inner` lies in `outer`; a box without pixels is contained in none."""
    return (
        box_area_px(inner) > 0
        and outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and outer[2] >= inner[2]
        and outer[3] >= inner[3]
    )


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 without area."""
    common = box_area_px((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area_px(a) + box_area_px(b) - common
    return common / union if union else 0.0


def scale_box(box: Box, from_size_px: tuple[int, int], to_size_px: tuple[int, int]) -> Box:
    """A box on a resized copy of its picture; rounded outwards, so that it covers all that it covered."""
    (from_w, from_h), (to_w, to_h) = from_size_px, to_size_px
    return (box[0] * to_w // from_w, box[1] * to_h // from_h, -(-box[2] * to_w // from_w), -(-box[3] * to_h // from_h))
