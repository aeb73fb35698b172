"""One turn's attention maps as the record of its tri-state labels, whatever the picture was padded to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qzoom.labels.regions import IGNORE, RegionLabelSettings, picture_in_square, region_labels
from qzoom.records.schema import RegionLabel
from qzoom.types import Box

__all__ = ["cells_touched", "label_record"]


def label_record(
    sink: np.ndarray,
    grounding: np.ndarray,
    settings: RegionLabelSettings,
    *,
    view: Literal["dynamic", "square"],
    size_px: tuple[int, int],
    boxes: Sequence[Box],
    **facts: Any,
) -> tuple[RegionLabel, np.ndarray]:
    """Label a turn.

    Args:
        sink: (rows, columns) map that shows sinks.
        grounding: (rows, columns) map that shows what the answer rests on.
        settings: thresholds.
        view: "square" when the picture was padded to one; its padding becomes background.
        size_px: (width, height) of the picture without padding.
        boxes: known answer boxes, to measure agreement; may be empty.
        **facts: question, turn, response, attention, text and prompt of the record.

    Returns:
        The record and its labels (rows, columns) int8.

    Raises:
        DataError: maps that cannot be labelled.
    """
    found = region_labels(sink, grounding, settings, padded_from_px=size_px if view == "square" else None)
    labels = found.labels.astype(np.int8)
    agrees = None
    if boxes and found.usable:
        agrees = bool((cells_touched(boxes, size_px, labels.shape, view) & (labels == 1)).any())
    record = RegionLabel(
        box=found.box,
        usable=found.usable and bool((labels == 1).any()),
        foreground=int((labels == 1).sum()),
        valid=int((labels != IGNORE).sum()),
        view=view,
        size_px=size_px,
        agrees=agrees,
        **facts,
    )
    return record, labels


def cells_touched(
    boxes: Sequence[Box], size_px: tuple[int, int], grid: tuple[int, ...], view: Literal["dynamic", "square"]
) -> np.ndarray:
    """Cells that any of the boxes touches, (rows, columns) bool; with "square" the picture stands in the middle."""
    rows, columns = grid
    x0, y0, x1, y1 = (0, 0, columns, rows) if view == "dynamic" else picture_in_square(size_px, rows)
    mask = np.zeros((rows, columns), dtype=bool)
    for left, top, right, bottom in boxes:
        xs = [x0 + left * (x1 - x0) // size_px[0], x0 - (-right * (x1 - x0) // size_px[0])]
        ys = [y0 + top * (y1 - y0) // size_px[1], y0 - (-bottom * (y1 - y0) // size_px[1])]
        mask[ys[0] : ys[1], xs[0] : xs[1]] = True
    return mask
