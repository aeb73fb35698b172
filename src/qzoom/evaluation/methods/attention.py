"""Training-free crop: where the question draws more attention than a generic request does (relative attention).

After the relative attention of ViCrop ("MLLMs Know Where to Look", arXiv 2502.17422): one layer's attention of the last
prompt token to the coarse cells, mean over heads, once for the question and once for a request to describe the picture;
their quotient shows what the question adds. Windows of several sizes slide over it; each size has
its best place, and the size wins whose best place stands out most from its neighbours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qzoom.engine.batch import prefill
from qzoom.engine.perceive import CoarseResult
from qzoom.evaluation.methods.base import Budget, MethodAnswer, Reading, box_on, start
from qzoom.types import Box, GateDecision

if TYPE_CHECKING:
    from qzoom.data.samples import EvalQuestion
    from qzoom.model import QZoom

__all__ = ["ATTENTION", "AttentionCrop", "best_window"]

GENERIC = "Write a general description of the image."
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""Sides of the sliding windows as shares of the grid's sides."""


@dataclass(frozen=True, slots=True)
class AttentionCrop:
    """Reads the window with the highest relative attention; see `Method`.

    Args:
        name: of the method.
        layer: whose attention is taken; None takes the one two thirds up.
        generic: the request that the question is compared with.
    """

    name: str
    layer: int | None = None
    generic: str = GENERIC

    @property
    def zooms(self) -> bool:
        """Yes."""
        return True

    @property
    def needs_region(self) -> bool:
        """No: the model's own attention says where."""
        return False

    @property
    def asks_gate(self) -> bool:
        """No."""
        return False

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """See `Method.answer`."""
        reading = start(model, images, question, budget)
        layer = self.layer if self.layer is not None else 2 * model.engine.backbone.num_layers // 3
        asked = _attention(reading, reading.look, layer)
        compared = reading.beside(self.generic)
        relative = asked / np.maximum(_attention(reading, compared, layer), 1e-9)
        reading.extra["prompt_tokens"] = len(reading.look.state.prompt) + len(compared.state.prompt)
        if not np.isfinite(relative).all() or float(relative.max()) <= 0:
            reading.extra["failures"] = 1
            return reading.coarse(GateDecision(None, None, False, "The attention shows no place."))
        x0, y0, x1, y1 = best_window(relative)
        (width, height), (rows, columns) = reading.size_px, reading.grid
        box: Box = (
            x0 * width // columns,
            y0 * height // rows,
            -(-x1 * width // columns),
            -(-y1 * height // rows),
        )
        return reading.zoomed([box_on(reading, box)])


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


def _attention(reading: Reading, item: CoarseResult, layer: int) -> np.ndarray:
    """Attention (rows, columns) of the last prompt token to the first picture's cells, mean over a layer's heads."""
    from qzoom.engine.attention import response_attention

    engine = reading.model.engine
    row = prefill(engine, [item], reading.clock)[0]
    prompt = item.state.prompt
    before = dataclasses.replace(prompt, ids=prompt.ids[:-1], positions=prompt.positions[:, :-1])
    with reading.clock.step("attention"):
        cache = row.cache.truncated(len(before))
        found = response_attention(engine.backbone, before, cache, [int(prompt.ids[-1])], [layer])[0]
    return found.values[0].mean(0).cpu().numpy()


ATTENTION = AttentionCrop("attention")
