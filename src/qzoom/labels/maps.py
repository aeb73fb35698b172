"""Ternary label maps from attention maps or known boxes: foreground, background, ignored (method.md 5.2, 5.3).

Pure arithmetic in float64. Attention maps come from `engine.attention`; the labels go to `training.losses.region_loss`.

    grounding map, sinks removed      labels (1 foreground, 0 background, . ignored)
      .0 .0 .0 .0 .0                    0 0 0 0 0
      .0 .1 .3 .0 .0                    0 . . . 0       the box of what the blur reaches is one cell
      .0 .2 .9 .1 .0                    0 . 1 . 0       wider than the foreground; inside it only
      .0 .0 .1 .0 .0                    0 . . . 0       foreground is certain
      .0 .0 .0 .0 .0                    0 0 0 0 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qzoom.data.cells import cells_touched, picture_in_square
from qzoom.errors import DataError
from qzoom.labels.settings import LabelMapSettings, View
from qzoom.store.schema import RegionLabel
from qzoom.types import Box

IGNORE = -100

CellBounds = tuple[int, int, int, int]  # x0, y0, x1, y1 in cells, half-open


def label_record(
    label_map: LabelMap, *, view: View, map_view: View, size_px: tuple[int, int], boxes: Sequence[Box], **facts: Any
) -> tuple[RegionLabel, np.ndarray]:
    """The record of a turn's label map, and its labels (rows, columns) int8.

    Args:
        label_map: the labels.
        view: "square" when the picture was padded to one before the model got it.
        map_view: "square" when the map shows it padded to one.
        size_px: (width, height) of the picture without padding.
        boxes: known answer boxes, to measure agreement; empty when there are none or the labels come from them.
        **facts: question, turn, response, attention, text and prompt of the record.
    """
    labels = label_map.labels.astype(np.int8)
    agrees = None
    if boxes and label_map.usable:
        agrees = bool((cells_touched(boxes, size_px, labels.shape, map_view) & (labels == 1)).any())
    record = RegionLabel(
        box=label_map.box,
        usable=label_map.usable and bool((labels == 1).any()),
        foreground=int((labels == 1).sum()),
        valid=int((labels != IGNORE).sum()),
        view=view,
        size_px=size_px,
        agrees=agrees,
        **facts,
    )
    return record, labels


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Labels of one map."""

    labels: np.ndarray  # (rows, columns) int64: 1 foreground, 0 background, -100 ignored
    # x0, y0, x1, y1 in cells, half-open, around the blurred foreground; the whole map when there is none
    box: CellBounds
    usable: bool  # False when the box is too large or the peak too low; then every label is -100


def region_labels(
    sink_map: np.ndarray,
    grounding_map: np.ndarray,
    settings: LabelMapSettings | None = None,
    *,
    padded_from_px: tuple[int, int] | None = None,
) -> LabelMap:
    """Label every cell.

    Args:
        sink_map: (rows, columns) attention that shows sinks.
        grounding_map: (rows, columns) attention that shows what the answer rests on.
        padded_from_px: (width, height) of a picture that was padded to a square; its padding is background and its
            attention there is dropped. None: the map shows the picture only.

    Raises:
        DataError: maps of different or wrong shapes, not finite, or padding asked of a map that is not square.
    """
    settings = settings or LabelMapSettings()
    if sink_map.shape != grounding_map.shape or grounding_map.ndim != 2 or not grounding_map.size:
        raise DataError(
            f"Sink map {sink_map.shape} and grounding map {grounding_map.shape} must be (rows, columns) of one shape."
        )
    if not (np.isfinite(sink_map).all() and np.isfinite(grounding_map).all()):
        raise DataError("An attention map holds values that are not finite; leave this sample out.")
    sinks = sink_map >= settings.sink_threshold
    padding = _padding(grounding_map.shape, padded_from_px)
    without_sinks = np.where(sinks, 0.0, grounding_map.astype(np.float64))
    seen = np.where(padding, 0.0, without_sinks)
    peak = float(seen.max())
    foreground = (seen > peak * settings.foreground) & (seen > 0)
    box = _widened_bounds(foreground, settings.reach_cells)
    x0, y0, x1, y1 = box
    outside = np.ones(foreground.shape, dtype=bool)
    outside[y0:y1, x0:x1] = False
    labels = np.full(foreground.shape, IGNORE, dtype=np.int64)
    usable = (x1 - x0) * (y1 - y0) < settings.ignore_share * labels.size and peak >= settings.min_peak
    if usable:
        labels[(outside & (without_sinks < peak * settings.background)) | padding] = 0
        labels[foreground] = 1
    return LabelMap(labels, box, usable)


def box_labels(
    boxes: Sequence[Box], size_px: tuple[int, int], grid: tuple[int, int], view: View = "dynamic"
) -> LabelMap:
    """Label every cell from known answer boxes: touched cells are foreground, their neighbours ignored, the rest 0.

    The map, of (rows, columns) cells, is unusable without boxes, or when they touch half of it or more.
    """
    inside = cells_touched(boxes, size_px, grid, view)
    labels = np.full(grid, IGNORE, dtype=np.int64)
    usable = 0 < float(inside.mean()) < 0.5
    if usable:
        padded = np.pad(inside, 1)
        rows, columns = grid
        near = np.any([padded[y : y + rows, x : x + columns] for y in range(3) for x in range(3)], axis=0)
        labels[~near], labels[inside] = 0, 1
    return LabelMap(labels, _widened_bounds(inside, 0), usable)


def _padding(shape: tuple[int, ...], padded_from_px: tuple[int, int] | None) -> np.ndarray:
    rows, columns = shape
    if padded_from_px is None:
        return np.zeros((rows, columns), dtype=bool)
    if rows != columns:
        raise DataError(f"A map of {rows} x {columns} cells is not square, so its picture was not padded to a square.")
    x0, y0, x1, y1 = picture_in_square(padded_from_px, rows)
    padding = np.ones((rows, columns), dtype=bool)
    padding[y0:y1, x0:x1] = False
    return padding


def _widened_bounds(foreground: np.ndarray, reach: int) -> CellBounds:
    """Bounds of everything that a blur of this reach would lift above zero; the whole map without foreground."""
    rows, columns = foreground.shape
    ys, xs = np.nonzero(foreground)
    if not len(ys):
        return 0, 0, columns, rows
    return (
        max(0, int(xs.min()) - reach),
        max(0, int(ys.min()) - reach),
        min(columns, int(xs.max()) + 1 + reach),
        min(rows, int(ys.max()) + 1 + reach),
    )
