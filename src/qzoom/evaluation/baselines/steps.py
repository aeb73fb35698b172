"""The engine's steps for methods that look in their own way: coarse look, a box from elsewhere, the answer.

Prompt, crop, insertion and decoding are those of the engine, so that methods differ in where they look and in nothing
else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qzoom.engine.answer import prefill, read_regions
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.decode import DecodeBatch, DecodeRow
from qzoom.engine.look import Look, look
from qzoom.engine.prompt import prefix_length
from qzoom.engine.request import Request
from qzoom.engine.session import Session
from qzoom.engine.state import truncate
from qzoom.engine.timing import Stopwatch
from qzoom.evaluation.baselines.base import Budget, MethodAnswer
from qzoom.heads.boxes import MapBox, cells_to_pixels
from qzoom.types import Box, GateDecision, SamplingParams, Usage

if TYPE_CHECKING:
    from qzoom.evaluation.records import EvalQuestion
    from qzoom.model import QZoom

__all__ = ["Reading", "box_on", "decode_row", "start"]


@dataclass(frozen=True, slots=True)
class Reading:
    """A question whose coarse look has been taken.

    Args:
        model: who reads.
        look: the engine's state after the shared layers; no gate was asked.
        clock: milliseconds per step.
        started_s: when the method began, by `time.perf_counter`.
        extra: see `MethodAnswer`.
    """

    model: QZoom
    look: Look
    clock: Stopwatch
    started_s: float
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the first picture."""
        return self.look.request.pictures[0].size_px

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the first picture's coarse cells."""
        return self.look.state.prompt.spans[0].features.grid

    def beside(self, text: str, max_new_tokens: int | None = None) -> Look:
        """The look at another question about the same pictures, which are not encoded or read again.

        Args:
            text: what to ask instead.
            max_new_tokens: of its answer; None leaves the budget's.
        """
        engine, given, state = self.model.engine, self.look.request, self.look.state
        system = next((m["content"][0]["text"] for m in given.conversation.messages if m["role"] == "system"), None)
        conversation = read_conversation([None] * len(given.pictures), text, system)
        ids = tuple(ChatEncoder(engine.backbone).encode(conversation))
        end = prefix_length(engine.backbone, state.prompt)
        prompt = dataclasses.replace(
            state.prompt, ids=state.prompt.ids[:end], positions=state.prompt.positions[:, :end]
        )
        options = given.options
        if max_new_tokens is not None:
            options = dataclasses.replace(options, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        other = Request(conversation, ids, given.pictures, options, truncate(state, end).on(prompt))
        return look(engine, [other], self.clock)[0]

    def coarse(self, gate: GateDecision | None = None, row: DecodeRow | None = None) -> MethodAnswer:
        """Answer from the coarse look.

        Args:
            gate: what was decided; None for "nobody was asked".
            row: the finished prefill, if there is one.
        """
        item = dataclasses.replace(self.look, gate=gate or GateDecision(None, None, False))
        return self._answered(item, row or prefill(self.model.engine, [item], self.clock)[0])

    def zoomed(self, boxes: Sequence[MapBox], gate: GateDecision | None = None) -> MethodAnswer:
        """Answer with regions read at high resolution.

        Args:
            boxes: best first; at least one.
            gate: what was decided; None for "nobody was asked".
        """
        engine = self.model.engine
        decided = gate or GateDecision(None, None, True)
        item = dataclasses.replace(self.look, gate=decided, boxes=tuple(boxes))
        looks, regions = read_regions(engine, [item], self.clock)
        answer = self._answered(looks[0], prefill(engine, looks, self.clock)[0])
        tokens = sum(region.tokens for region in regions[0])
        return dataclasses.replace(
            answer, regions=regions[0], usage=dataclasses.replace(answer.usage, region_tokens=tokens)
        )

    def _answered(self, item: Look, row: DecodeRow) -> MethodAnswer:
        decode_row(self.model, row, self.clock)
        spans = item.state.prompt.spans
        usage = Usage(
            coarse_tokens=sum(s.stop - s.start for s in spans if s.role == "coarse"),
            prompt_tokens=len(item.state.prompt),
            completion_tokens=len(row.tokens),
        )
        seconds = time.perf_counter() - self.started_s
        text, finish = row.stream.text, row.finish or "stop"
        return MethodAnswer(text, finish, item.gate, (), usage, seconds, self.clock.snapshot(), dict(self.extra))


def start(model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> Reading:
    """Take the coarse look at a question.

    Args:
        model, images, question, budget: see `Method.answer`.
    """
    started_s = time.perf_counter()
    request = _request(model, images, question.question, budget)
    clock = Stopwatch(model.engine.backbone.device)
    return Reading(model, look(model.engine, [request], clock)[0], clock, started_s)


def decode_row(model: QZoom, row: DecodeRow, clock: Stopwatch) -> None:
    """Generate until the row ends; text and tokens stay on it."""
    batch = DecodeBatch(model.engine.backbone)
    with clock.step("decode"):
        batch.start([row])
        while batch.rows:
            batch.step()


def box_on(reading: Reading, box: Box, margin_cells: float = 0.0) -> MapBox:
    """A box in original pixels of the first picture as the engine reads it.

    Args:
        reading: for the picture's size, its grid and the checkpoint's smallest box.
        box: xyxy, half-open.
        margin_cells: coarse cells added on every side.
    """
    (width, height), (rows, columns) = reading.size_px, reading.grid
    x, y = columns / width, rows / height
    cells = (
        max(0.0, box[0] * x - margin_cells),
        max(0.0, box[1] * y - margin_cells),
        min(float(columns), box[2] * x + margin_cells),
        min(float(rows), box[3] * y + margin_cells),
    )
    least = reading.model.config.box.min_side_px
    pixels = cells_to_pixels(cells, (rows, columns), reading.size_px, min_side_px=least, scaling="exact")
    return MapBox(0, cells, pixels, 0.0)


def _request(model: QZoom, images: Any, text: str, budget: Budget) -> Request:
    options = budget.of_question("never")
    if isinstance(images, Session):
        return images.request(text, **options)
    return model.request(images, text, coarse_tokens=budget.coarse, **options)
