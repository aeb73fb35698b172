"""Cells (visual tokens) under boxes, and the size of a target. Pure geometry.

Boxes are (x0, y0, x1, y1) in original pixels, x1 and y1 exclusive; the grid divides the image evenly. The size of a
target is the share of the image that the smallest rectangle around its boxes covers, in bins on a logarithmic scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qzoom.errors import DataError
from qzoom.images.geometry import box_area_px, clip_box
from qzoom.types import Box


def covered_cells(boxes: Sequence[Box], size_px: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The covered share of every cell.

    Args:
        boxes: any number; what they share counts once, what lies outside not at all.
        grid: (rows, columns).

    Returns:
        (rows, columns) float64 from 0 to 1; its mean is the covered share of the picture.
    """
    rows, columns = grid
    inside = [clip_box(box, size_px) for box in boxes]
    xs = _edges([side for box in inside for side in (box[0], box[2])], size_px[0], columns)
    ys = _edges([side for box in inside for side in (box[1], box[3])], size_px[1], rows)
    middle_x, middle_y = (xs[:-1] + xs[1:]) / 2, (ys[:-1] + ys[1:]) / 2
    covered = np.zeros((len(middle_y), len(middle_x)), dtype=bool)
    for x0, y0, x1, y1 in inside:
        across = (middle_x > x0 * columns / size_px[0]) & (middle_x < x1 * columns / size_px[0])
        down = (middle_y > y0 * rows / size_px[1]) & (middle_y < y1 * rows / size_px[1])
        covered |= down[:, None] & across[None]
    pieces = covered * np.diff(ys)[:, None] * np.diff(xs)[None]
    out = np.zeros(grid)
    np.add.at(out, (np.floor(middle_y).astype(int)[:, None], np.floor(middle_x).astype(int)[None]), pieces)
    return out


def _edges(sides: Sequence[int], length_px: int, cells: int) -> np.ndarray:
    """All borders in units of cells: those of the cells and those of the boxes, ascending."""
    return np.unique(np.concatenate([np.arange(cells + 1), np.asarray(sides, dtype=float) * cells / length_px]))


def cells_touched(boxes: Sequence[Box], size_px: tuple[int, int], grid: tuple[int, ...], view: str) -> np.ndarray:
    """Cells that any of the boxes touches, (rows, columns) bool; "dynamic" fills the grid, "square" pads to one."""
    rows, columns = grid
    x0, y0, x1, y1 = (0, 0, columns, rows) if view == "dynamic" else picture_in_square(size_px, rows)
    mask = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in boxes:
        xs = [x0 + left * (x1 - x0) // size_px[0], x0 - (-right * (x1 - x0) // size_px[0])]
        ys = [y0 + top * (y1 - y0) // size_px[1], y0 - (-bottom * (y1 - y0) // size_px[1])]
        mask[ys[0] : ys[1], xs[0] : xs[1]] = True
    return mask


def picture_in_square(size_px: tuple[int, int], cells: int) -> Box:
    """Which cells of a square map show the picture when it was padded to a square before encoding.

    The shorter side is rounded down to whole cells, at least one; an odd cell of padding counts as picture.

    Args:
        size_px: (width, height) of the picture before padding.
        cells: rows (and columns) of the map.

    Returns:
        x0, y0, x1, y1 in cells, half-open.

    Raises:
        DataError: a side below 1.
    """
    if min(*size_px, cells) < 1:
        raise DataError(f"A picture of {size_px[0]} x {size_px[1]} px on {cells} cells has no content; check its size.")
    x0, y0 = ((cells - max(1, int(side / max(size_px) * cells))) // 2 for side in size_px)
    return x0, y0, cells - x0, cells - y0


_EDGES = (0.001, 0.003, 0.01, 0.03, 0.1)
AREA_BINS = ("<0.1%", "0.1-0.3%", "0.3-1%", "1-3%", "3-10%", ">=10%")
"""Names of the bins, smallest first; an upper edge belongs to the next bin."""


def around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of at least one box."""
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def area_share(boxes: Sequence[Box], size_px: tuple[int, int]) -> float:
    """Share of a picture that the box around all boxes covers; parts outside the picture do not count. `boxes`: at
    least one. `size_px`: (width, height); a picture without pixels gives 0."""
    pixels = size_px[0] * size_px[1]
    return box_area_px(clip_box(around(boxes), size_px)) / pixels if pixels else 0.0


def area_bin(share: float) -> str:
    """The bin of a share, one of `AREA_BINS`."""
    return AREA_BINS[sum(share >= edge for edge in _EDGES)]
