"""Training-free crop: the region that gets more attention from the question than from a generic request.

After the relative attention of ViCrop ("MLLMs Know Where to Look", arXiv 2502.17422): one layer's attention of the last
prompt token to the coarse cells, averaged over heads, for the question, divided by that for a request to describe the
image. Windows of several sizes slide over the quotient; the size whose best position exceeds its neighbours most is
chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.data.samples import SampleQuestion
from qzoom.engine.attention import response_attention
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import CoarseResult
from qzoom.engine.request import Options
from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.methods.base import Answered, Method, Reading, box_on, start
from qzoom.heads.boxes import cells_to_pixels
from qzoom.images.geometry import box_area_px
from qzoom.model import QZoom
from qzoom.types import GateDecision

GENERIC = "Write a general description of the image."
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Sides of the sliding windows as shares of the grid's sides."""


def crop_by_attention(
    model: QZoom,
    images: Any,
    question: SampleQuestion,
    options: Options,
    *,
    layer: int | None = None,
    generic: str = GENERIC,
) -> Answered:
    """Read the window with the highest relative attention; see `Method.answer` (ConfigError: a hybrid model). `layer`:
    whose attention is taken; None takes the one two thirds up."""
    reading = start(model, images, question, options)
    backbone = model.engine.backbone
    need_full_attention(backbone, 'The method "attention"', "name another one with --method")
    layer = layer if layer is not None else 2 * backbone.num_layers // 3
    other = reading.other_question(generic)
    own, base = (prompt_attention(reading, item, [layer])[0].mean(0).cpu().numpy() for item in (reading.coarse, other))
    relative = own / np.maximum(base, 1e-9)
    reading.extra["upper_tokens"] = len(reading.coarse.state.prompt)
    if not np.isfinite(relative).all() or float(relative.max()) <= 0:
        reading.extra["failures"] = 1
        return reading.answer_coarse(GateDecision(None, None, False, "The attention shows no place."))
    padded = backbone.square_padding is not None
    window = best_window(relative)
    box = cells_to_pixels(window, reading.grid, reading.size_px, min_side_px=1, scaling="exact", padded=padded)
    if not box_area_px(box):
        reading.extra["failures"] = 1
        return reading.answer_coarse(GateDecision(None, None, False, "The attention lies beside the picture."))
    return reading.answer_zoomed([box_on(reading, box)])


def need_full_attention(backbone: Backbone, what: str, remedy: str) -> None:
    """Refuse work that reads the attention of all layers (ConfigError), where some have none. `what` needs it."""
    if len(backbone.attention_layers) < backbone.num_layers:
        raise ConfigError(f"{what} needs full attention in every layer, which {backbone.family} models lack; {remedy}.")


def best_window(values: np.ndarray, shares: tuple[float, ...] = SHARES) -> tuple[int, int, int, int]:
    """The window that stands out most.

    Args:
        values: (rows, columns), not negative.
        shares: sides of the windows as shares of the grid's sides; at least one cell.

    Returns:
        x0, y0, x1, y1 in cells, half-open; of equal ones the smallest, then the first in reading order.
    """
    rows, columns = values.shape
    best, best_lead = (0, 0, columns, rows), -np.inf
    for share in sorted(shares):
        high, wide = (max(1, min(side, round(side * share))) for side in (rows, columns))
        means = np.lib.stride_tricks.sliding_window_view(values.astype(np.float64), (high, wide)).mean((2, 3))
        y, x = np.unravel_index(int(means.argmax()), means.shape)
        near = means[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        lead = float(means[y, x] - (near.sum() - means[y, x]) / max(1, near.size - 1)) if near.size > 1 else 0.0
        if lead > best_lead + 1e-12:
            best, best_lead = (int(x), int(y), int(x) + wide, int(y) + high), lead
    return best


def prompt_attention(reading: Reading, item: CoarseResult, layers: Sequence[int]) -> Tensor:
    """Attention of a prompt's last token to the first picture's cells, without eager attention.

    The last token is run once more over the cached keys, and only its queries are multiplied with them.

    Args:
        item: the prompt, its coarse pass done.

    Returns:
        (layers, heads, rows, columns) float32.

    Raises:
        DataError: the prompt holds no picture.

    All layers need full attention, see `need_full_attention`.
    """
    engine, prompt = reading.model.engine, item.state.prompt
    with torch.inference_mode():
        row = prefill(engine, [item], reading.clock)[0]
        before = dataclasses.replace(prompt, ids=prompt.ids[:-1], positions=prompt.positions[:, :-1])
        with reading.clock.step("attention"):
            cache = row.cache.truncated(len(before))
            maps = response_attention(engine.backbone, before, cache, [int(prompt.ids[-1])], layers)
    if not maps:
        raise DataError("The prompt holds no picture, so there is no attention to it.")
    return maps[0].values


ATTENTION = Method("attention", crop_by_attention)
