"""Find the attention heads that point: every head is scored on pictures whose answer boxes are known.

Sinks show as visual tokens with an outsized hidden state (method.md 5.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.engine.attention import ResponseAttention
from qzoom.engine.prompt import VisualSpan
from qzoom.types import Box

__all__ = ["HeadScore", "cells_of_boxes", "rank_heads", "sink_cells"]


@dataclass(frozen=True, slots=True)
class HeadScore:
    """How well one head points.

    Args:
        layer: index of the decoder layer.
        head: index of the query head.
        hit: share of questions whose highest cell touches an answer box.
        lift: share of the head's visual attention inside the boxes, divided by the boxes' share of the cells.
    """

    layer: int
    head: int
    hit: float
    lift: float


def cells_of_boxes(boxes: Sequence[Box], size_px: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cells that any of the boxes touches.

    Args:
        boxes: xyxy in original pixels, half-open.
        size_px: (width, height) of the picture.
        grid: (rows, columns).

    Returns:
        (rows, columns) bool.
    """
    rows, columns = grid
    width, height = size_px
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        left, right = x0 * columns // width, -(-x1 * columns // width)
        top, bottom = y0 * rows // height, -(-y1 * rows // height)
        mask[top:bottom, left:right] = True
    return mask


def rank_heads(samples: Sequence[tuple[ResponseAttention, Tensor]]) -> list[HeadScore]:
    """Score every head, best first (by hit rate, then lift).

    Args:
        samples: the attention of a response and the (rows, columns) bool cells of its answer.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("Heads cannot be ranked without samples.")
    layers, heads = samples[0][0].layers, samples[0][0].values.shape[1]
    hits = torch.zeros(len(layers), heads)
    lifts = torch.zeros(len(layers), heads)
    for attention, cells in samples:
        flat = attention.values.flatten(2)
        inside = cells.flatten()
        hits += inside[flat.argmax(-1)].float()
        share = (flat * inside).sum(-1) / flat.sum(-1).clamp_min(1e-12)
        lifts += share / inside.float().mean().clamp_min(1e-12)
    scores = [
        HeadScore(layer, head, float(hits[i, head]) / len(samples), float(lifts[i, head]) / len(samples))
        for i, layer in enumerate(layers)
        for head in range(heads)
    ]
    return sorted(scores, key=lambda s: (-s.hit, -s.lift, s.layer, s.head))


def sink_cells(hidden: Tensor, span: VisualSpan, ratio: float = 3.0) -> Tensor:
    """Cells whose hidden state is outsized: norm above `ratio` times the median of the picture's cells.

    Args:
        hidden: (length, hidden) states of the prompt, e.g. H_K.
        span: the picture.
        ratio: how much larger.

    Returns:
        (rows, columns) float32, 1 at sinks.
    """
    norms = hidden[span.start : span.stop].float().norm(dim=-1)
    return (norms > ratio * norms.median()).float().view(span.features.grid)
