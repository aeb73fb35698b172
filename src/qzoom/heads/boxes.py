"""Region map -> boxes: threshold, one union box or connected components, cells to original pixels (docs/method.md 3).

The release's arithmetic is the default (float32 scaling, absolute threshold, one union box); `BoxRule` chooses ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from torch import Tensor

from qzoom.config import BoxRule
from qzoom.types import Box

CellBox = tuple[float, float, float, float]  # x0, y0, x1, y1 in coarse cells


@dataclass(frozen=True, slots=True)
class MapBox:
    """A box found on one picture's map.

    Args:
        image: index of the map.
        cells: x0, y0, x1, y1 in coarse cells, half-open, margin included (whole numbers without a margin).
        box: xyxy in original pixels, half-open, margin included.
        score: the highest map value inside `cells`.
    """

    image: int
    cells: CellBox
    box: Box
    score: float


def boxes_from_maps(
    maps: Sequence[Tensor],
    sizes_px: Sequence[tuple[int, int]],
    *,
    threshold: float,
    rule: BoxRule,
    token_px: int,
) -> tuple[MapBox, ...]:
    """Boxes over one or several pictures, best first.

    With "union" and "peak_component" there is at most one box, on the picture that holds the highest foreground cell.

    Args:
        maps: blurred probabilities (rows, columns), one per picture.
        sizes_px: (width, height) of each picture.
        threshold: foreground is strictly above it (times the highest value of all maps with a peak-relative rule).
        rule: how cells become boxes.
        token_px: side of a visual token in resized pixels; it only matters to float32 rounding.

    Returns:
        An empty tuple when nothing is above the threshold.
    """
    grids = [m.detach().float().cpu().numpy() for m in maps]
    peak = max((float(g.max()) for g in grids), default=0.0)
    if rule.threshold == "relative":
        if peak <= rule.min_peak:
            return ()
        level = threshold * peak
    else:
        level = threshold
    found: list[tuple[float, int, tuple[int, int, int, int]]] = []
    for image, grid in enumerate(grids):
        foreground = grid > np.float32(level)
        groups = [foreground] if rule.components == "union" else _components(foreground)
        for group in groups:
            if group.any():
                found.append((float(grid[group].max()), image, _bounds(group)))
    found.sort(key=lambda item: (-item[0], item[1], item[2]))
    keep = rule.max_regions if rule.components == "all" else 1
    return tuple(
        map_box(cells, grids[image].shape, sizes_px[image], rule=rule, token_px=token_px, image=image, score=score)
        for score, image, cells in found[:keep]
    )


def map_box(
    cells: CellBox,
    grid: tuple[int, ...],
    size_px: tuple[int, int],
    *,
    rule: BoxRule,
    token_px: int,
    image: int = 0,
    score: float = 0.0,
) -> MapBox:
    """A box given in coarse cells, in cells and pixels that agree; the rule's margin is added.

    Args:
        cells: x0, y0, x1, y1 in cells, half-open; may be fractional.
        grid: (rows, columns) of the map.
        size_px: (width, height) of the picture.
        rule: margin, smallest side and scaling.
        token_px: side of a visual token in resized pixels.
        image: index of the picture.
        score: of the box.
    """
    rows, columns = grid
    x0, y0, x1, y1 = cells
    margin = rule.margin_cells
    wider = (max(0, x0 - margin), max(0, y0 - margin), min(columns, x1 + margin), min(rows, y1 + margin))
    pixels = cells_to_pixels(
        wider, grid, size_px, min_side_px=rule.min_side_px, scaling=rule.scaling, token_px=token_px
    )
    return MapBox(image, wider, pixels, score)


def cells_to_pixels(
    cells: Sequence[float],
    grid: tuple[int, ...],
    size_px: tuple[int, int],
    *,
    min_side_px: int = 28,
    scaling: str = "float32",
    token_px: int = 28,
) -> Box:
    """A box in cells to a box in original pixels.

    Args:
        cells: x0, y0, x1, y1 in cells, half-open; may be fractional.
        grid: (rows, columns) of the map.
        size_px: (width, height) of the picture.
        min_side_px: smaller sides grow about the centre and slide back inside.
        scaling: "float32" (the release: cut to integers, may lose a pixel) or "exact" (covers every touched pixel).
        token_px: side of a visual token in resized pixels ("float32" only).
    """
    rows, columns = grid
    width, height = size_px
    axis = _axis_float32 if scaling == "float32" else _axis_exact
    x0, x1 = axis((cells[0], cells[2]), columns, width, min_side_px, token_px)
    y0, y1 = axis((cells[1], cells[3]), rows, height, min_side_px, token_px)
    return (x0, y0, x1, y1)


def _axis_float32(span: tuple[float, float], cells: int, side: int, least: int, token_px: int) -> tuple[int, int]:
    """The release's order of operations: cells -> resized pixels -> source pixels, each rounded to float32."""
    low, high = span
    f = np.float32
    ratio = f(side / (cells * token_px))
    start, end = f(f(low * token_px) * ratio), f(f(high * token_px) * ratio)
    length = f(end - start)
    if length < least:
        pad = f(f(f(least) - length) / f(2))
        start, end = f(start - pad), f(end + pad)
    if start < 0:
        start, end = f(0), f(end - start)
    if end > side:
        start, end = f(start - f(end - f(side))), f(side)
    return int(max(f(0), min(f(side), start))), int(max(f(0), min(f(side), end)))


def _axis_exact(span: tuple[float, float], cells: int, side: int, least: int, token_px: int) -> tuple[int, int]:
    """Every original pixel that a chosen cell touches, in whole numbers."""
    low, high = span
    start, end = floor(low * side / cells), ceil(high * side / cells)
    missing = min(least, side) - (end - start)
    if missing > 0:
        start -= missing // 2
        end += missing - missing // 2
    if start < 0:
        start, end = 0, end - start
    if end > side:
        start, end = start - (end - side), side
    return max(0, start), min(side, end)


def _bounds(group: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(group)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _components(foreground: np.ndarray) -> list[np.ndarray]:
    """8-connected components of a boolean (rows, columns) array."""
    rows, columns = foreground.shape
    open_cells = {(int(r), int(c)) for r, c in zip(*np.nonzero(foreground), strict=True)}
    groups = []
    while open_cells:
        stack = [open_cells.pop()]
        group = np.zeros((rows, columns), dtype=bool)
        while stack:
            row, column = stack.pop()
            group[row, column] = True
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & open_cells
            open_cells -= near
            stack.extend(near)
        groups.append(group)
    return groups
