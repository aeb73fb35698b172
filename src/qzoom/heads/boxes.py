"""Region map -> boxes: threshold, one union box or connected components, cells to original pixels (docs/method.md 3).

The release's arithmetic is the default (float32 scaling, absolute threshold, one union box); `BoxRule` chooses ours.
"""

from __future__ import annotations

import dataclasses
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
    """A box found on one picture's map."""

    image: int  # index of the map
    cells: CellBox  # x0, y0, x1, y1 in coarse cells, half-open, margin included (whole numbers without a margin)
    box: Box  # xyxy in original pixels, half-open, margin included
    score: float  # the highest map value inside `cells`
    # (rows, columns) bool, the foreground inside `cells`, where only tokens on it are to be read; None: all
    keep: np.ndarray | None = dataclasses.field(default=None, compare=False)
    # (rows, columns) bool, its foreground on the whole map, where `BoxRule.sparse` reads tokens on it only; None: all
    foreground: np.ndarray | None = dataclasses.field(default=None, compare=False)


def boxes_from_maps(
    maps: Sequence[Tensor],
    sizes_px: Sequence[tuple[int, int]],
    *,
    threshold: float,
    rule: BoxRule,
    token_px: int,
    padded: bool = False,
) -> tuple[MapBox, ...]:
    """Boxes over one or several pictures, best first ("groups": in reading order).

    With "union" and "peak_component" there is at most one box, on the picture that holds the highest foreground cell.
    What lies wholly in the padding of a padded picture gives no box.

    Args:
        maps: blurred probabilities (rows, columns), one per picture.
        sizes_px: (width, height) of each picture.
        threshold: foreground is strictly above it (times the highest value of all maps with a peak-relative rule).
        token_px: side of a visual token in resized pixels; it only matters to float32 rounding.

    Returns:
        An empty tuple when nothing is above the threshold.
    """
    grids = [m.detach().float().cpu().numpy() for m in maps]
    peak = max((float(g.max()) for g in grids), default=0.0)
    if rule.threshold == "relative" and peak <= rule.min_peak:
        return ()
    level = threshold * peak if rule.threshold == "relative" else threshold

    def box(group: np.ndarray, image: int, cells: CellBox) -> MapBox:
        grid, score = grids[image], float(grids[image][group].max())
        place = {"rule": rule, "token_px": token_px, "padded": padded}
        out = map_box(cells, grid.shape, sizes_px[image], image=image, score=score, **place)  # type: ignore[arg-type]
        return out if rule.sparse is None else dataclasses.replace(out, foreground=group)

    found: list[MapBox] = []
    for image, grid in enumerate(grids):
        foreground = grid > np.float32(level)
        groups = [foreground] if rule.components == "union" else connected_groups(foreground)
        if rule.components != "groups":
            found += [box(group, image, bounds(group)) for group in groups if group.any()]
            continue
        cells = [(group, group_cells(group, rule)) for group in groups]
        own = [box(group, image, around) for group, around in cells if around is not None]
        own = [item for item in own if _has_pixels(item)]
        if len(own) > rule.max_regions:
            x0, y0, x1, y1 = bounds(foreground)
            whole = dataclasses.replace(box(foreground, image, (x0, y0, x1, y1)), keep=foreground[y0:y1, x0:x1])
            own = [whole] if rule.too_many == "mask" else []
        found += own
    if rule.components == "groups":
        return tuple(found)
    found = [item for item in found if _has_pixels(item)]
    found.sort(key=lambda item: (-item.score, item.image, item.cells))
    return tuple(found[: rule.max_regions if rule.components == "all" else 1])


def group_cells(group: np.ndarray, rule: BoxRule) -> tuple[int, int, int, int] | None:
    """The box of one component under "groups", x0, y0, x1, y1 in cells, half-open; None where it gives none."""
    count = int(group.sum())
    if count < rule.min_cells or (rule.max_cells is not None and count > rule.max_cells):
        return None
    x0, y0, x1, y1 = bounds(group)
    if count > rule.widen_cells:
        return x0, y0, x1, y1
    (x0, x1), (y0, y1) = (
        _widened(*span, side, to_edge=rule.widen_to_edge)
        for span, side in (((x0, x1), group.shape[1]), ((y0, y1), group.shape[0]))
    )
    return x0, y0, x1, y1


def _widened(low: int, high: int, side: int, *, to_edge: bool) -> tuple[int, int]:
    """One more cell and at least three, about the centre, halves cut towards zero."""
    centre, length = (low + high) / 2, max(3, high - low + 1)
    return max(0, int(centre - length / 2)), min(side if to_edge else side - 1, int(centre + length / 2))


def _has_pixels(item: MapBox) -> bool:
    return item.box[2] > item.box[0] and item.box[3] > item.box[1]


def map_box(
    cells: CellBox,
    grid: tuple[int, ...],
    size_px: tuple[int, int],
    *,
    rule: BoxRule,
    token_px: int,
    image: int = 0,
    score: float = 0.0,
    padded: bool = False,
) -> MapBox:
    """A box given in coarse cells, in cells and pixels that agree; the rule's margin is added.

    Args:
        cells: x0, y0, x1, y1 in cells, half-open; may be fractional.
        token_px: side of a visual token in resized pixels.
        padded: the map shows the picture padded to a square.
    """
    rows, columns = grid
    x0, y0, x1, y1 = cells
    margin = rule.margin_cells
    wider = (max(0, x0 - margin), max(0, y0 - margin), min(columns, x1 + margin), min(rows, y1 + margin))
    pixels = cells_to_pixels(
        wider, grid, size_px, min_side_px=rule.min_side_px, scaling=rule.scaling, token_px=token_px, padded=padded
    )
    return MapBox(image, wider, _with_a_pixel(pixels, wider, grid, size_px) if padded else pixels, score)


def cells_to_pixels(
    cells: Sequence[float],
    grid: tuple[int, ...],
    size_px: tuple[int, int],
    *,
    min_side_px: int = 28,
    scaling: str = "float32",
    token_px: int = 28,
    padded: bool = False,
) -> Box:
    """A box in cells to a box in original pixels.

    Args:
        cells: x0, y0, x1, y1 in cells, half-open; may be fractional.
        min_side_px: smaller sides grow about the centre and slide back inside.
        scaling: "float32" (the release: cut to integers, may lose a pixel) or "exact" (covers every touched pixel).
        token_px: side of a visual token in resized pixels ("float32" only).
        padded: the map shows the picture padded to a square; a box in the padding has no width or no height.
    """
    rows, columns = grid
    width, height = size_px
    if padded:
        along = {"longest": max(size_px), "least": min_side_px, "token_px": token_px if scaling == "float32" else 0}
        (x0, x1), (y0, y1) = (
            _axis_padded((cells[i], cells[i + 2]), count, side, **along)
            for i, (count, side) in enumerate(((columns, width), (rows, height)))
        )
        return (x0, y0, x1, y1)
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


def _axis_padded(
    span: tuple[float, float], cells: int, side: int, *, longest: int, least: int, token_px: int
) -> tuple[int, int]:
    """Through the padded square, whose side is `longest`; with a `token_px` in the release's order and rounding."""
    if token_px:
        f = np.float32
        ratio = cells * token_px / longest
        margin = f((cells * token_px - int(side * ratio)) / 2)
        ends = [float(f(f(f(end * token_px) - margin) / f(ratio))) for end in span]
    else:
        before = (longest - side) // 2
        ends = [floor(span[0] * longest / cells) - before, ceil(span[1] * longest / cells) - before]
    start, end = (int(min(max(value, 0), side)) for value in ends)
    missing = min(least, side) - (end - start) if end > start else 0
    if missing > 0:
        start = min(max(0, start - missing // 2), side - min(least, side))
        end = start + min(least, side)
    return start, end


def picture_bounds(size_px: tuple[int, int], grid: tuple[int, ...]) -> CellBox:
    """Where a picture that was padded to a square lies in its map, x0, y0, x1, y1 in cells."""
    longest = max(size_px)
    (x0, x1), (y0, y1) = (
        (((longest - side) // 2) * count / longest, ((longest - side) // 2 + side) * count / longest)
        for side, count in ((size_px[0], grid[1]), (size_px[1], grid[0]))
    )
    return x0, y0, x1, y1


def _with_a_pixel(pixels: Box, cells: CellBox, grid: tuple[int, ...], size_px: tuple[int, int]) -> Box:
    """A box whose cells show at least half a cell of the picture has at least one pixel: cells may be smaller."""
    out, picture = list(pixels), picture_bounds(size_px, grid)
    for i in (0, 1):
        shown = min(cells[i + 2], picture[i + 2]) - max(cells[i], picture[i])
        if out[i] == out[i + 2] and shown >= 0.5:
            out[i] = min(out[i], size_px[i] - 1)
            out[i + 2] = out[i] + 1
    return (out[0], out[1], out[2], out[3])


def bounds(group: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest box x0, y0, x1, y1 in cells, half-open, around the true cells of a (rows, columns) array."""
    rows, columns = np.nonzero(group)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def foreground_tokens(item: MapBox, grid: tuple[int, int], margin_cells: float) -> np.ndarray:
    """Which tokens of a region lie on its foreground, on the margin around it, or next to these: bool, as `grid`.

    Args:
        item: a box with its foreground.
        grid: (rows, columns) of the region's tokens.
        margin_cells: see `BoxRule`.
    """
    assert item.foreground is not None
    near = []
    for axis, count, cells in ((1, grid[0], item.foreground.shape[0]), (0, grid[1], item.foreground.shape[1])):
        low, high = item.cells[axis], item.cells[axis + 2]
        step = (high - low) / count
        centres = low + (np.arange(count) + 0.5) * step
        reach = 0.5 + margin_cells + step
        near.append(np.abs(centres[:, None] - (np.arange(cells) + 0.5)) < reach + 1e-9)
    return near[0] @ item.foreground @ near[1].T


def connected_groups(foreground: np.ndarray) -> list[np.ndarray]:
    """8-connected components of a boolean (rows, columns) array, in the order of their first cells, row by row."""
    rows, columns = foreground.shape
    open_cells = {(int(r), int(c)) for r, c in zip(*np.nonzero(foreground), strict=True)}
    groups = []
    for first in sorted(open_cells):
        if first not in open_cells:
            continue
        stack = [first]
        open_cells.discard(first)
        group = np.zeros((rows, columns), dtype=bool)
        while stack:
            row, column = stack.pop()
            group[row, column] = True
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & open_cells
            open_cells -= near
            stack.extend(near)
        groups.append(group)
    return groups
