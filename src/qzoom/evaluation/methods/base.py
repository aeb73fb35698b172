"""What every way of looking has in common: what it may spend, what it gives back, and how it is called.

All methods get the same pictures, the same question text and the same limits; only how they look differs.

The engine's steps for methods that look in their own way: coarse look, a box from elsewhere, the answer.

Prompt, crop, insertion and decoding are those of the engine, so that methods differ in where they look and in nothing
else.

The model's own ways to look: what its gate decides, the coarse look alone, the region always.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from qzoom.config import TokenBudget
from qzoom.engine.batch import prefill, read_regions
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.generate import DecodeBatch, DecodeRow, Stopwatch
from qzoom.engine.perceive import CoarseResult, look
from qzoom.engine.prompt import prefix_length
from qzoom.engine.request import Request
from qzoom.engine.session import Session
from qzoom.engine.state import truncate
from qzoom.heads.boxes import MapBox, cells_to_pixels
from qzoom.types import Answer, Box, GateDecision, Region, SamplingParams, Usage, ZoomMode

if TYPE_CHECKING:
    from qzoom.data.samples import EvalQuestion
    from qzoom.model import QZoom

__all__ = [
    "ALWAYS",
    "PLAIN",
    "QZOOM",
    "Budget",
    "Method",
    "MethodAnswer",
    "OwnWay",
    "Reading",
    "answer_of",
    "box_on",
    "decode_row",
    "start",
    "with_needed_branches",
]


@dataclass(frozen=True, slots=True)
class Budget:
    """What one answer may spend.

    Args:
        coarse: limits of the coarse look; None for the model's own. A session's own coarse look wins.
        region: limits of all regions together; None for the model's own.
        max_new_tokens: most tokens of the answer.
        gate_threshold: zoom at this score; None for the method's own.
        region_threshold: see `ZoomConfig.region_threshold`; None for the checkpoint's.
        zoom: what "qzoom" does; the other methods have it in their name.
    """

    coarse: TokenBudget | None = None
    region: TokenBudget | None = None
    max_new_tokens: int = 128
    gate_threshold: float | None = None
    region_threshold: float | None = None
    zoom: ZoomMode = "auto"

    def of_question(self, zoom: ZoomMode) -> dict[str, Any]:
        """Keyword arguments of `Session.ask` and, the coarse look aside, of `QZoom.ask`."""
        return {
            "zoom": zoom,
            "region_tokens": self.region,
            "gate_threshold": self.gate_threshold,
            "region_threshold": self.region_threshold,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True, slots=True)
class MethodAnswer:
    """One question as a method answered it.

    Args:
        text: the answer.
        finish_reason: see `qzoom.types.Answer`.
        gate: what was decided and by which score; `note` says why nothing was read where that was wanted.
        regions: what was read at high resolution.
        usage: tokens of the prompt that was answered.
        seconds: wall-clock time of everything that the method did.
        timing_ms: milliseconds per step.
        extra: what came on top of one prompt and its answer, by name: "prompt_tokens" and "completion_tokens" of
            further rounds, "failures" (1 when a round gave nothing to use).
    """

    text: str
    finish_reason: str
    gate: GateDecision
    regions: tuple[Region, ...]
    usage: Usage
    seconds: float
    timing_ms: dict[str, float]
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens paid, both looks."""
        return self.usage.coarse_tokens + self.usage.region_tokens

    def row_fields(self) -> dict[str, Any]:
        """The same as fields of `qzoom.data.samples.AnswerRow`, time and `extra` aside."""
        return {
            "prediction": self.text,
            "finish_reason": self.finish_reason,
            "gate": self.gate,
            "regions": self.regions,
            "usage": self.usage,
            "timing_ms": {name: round(ms, 2) for name, ms in self.timing_ms.items()},
        }


class Method(Protocol):
    """A way to look and answer. One object may be used for any number of questions; it keeps nothing of them."""

    @property
    def name(self) -> str:
        """Its name on the command line."""

    @property
    def zooms(self) -> bool:
        """Whether it reads regions, so that a total of visual tokens must be shared between two looks."""

    @property
    def needs_region(self) -> bool:
        """Whether the model must have a region branch."""

    @property
    def asks_gate(self) -> bool:
        """Whether the model's gate decides, where the zoom is "auto"."""

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """Answer one question.

        Args:
            model: the model under test.
            images: pictures as `QZoom.ask` takes them, or a `Session` over them, whose coarse look is shared by all
                its questions.
            question: what to ask; its right answer is never read, its boxes only by the oracle.
            budget: what may be spent.

        Raises:
            QZoomError: the question cannot be asked.
        """


def with_needed_branches(model: QZoom, method: Method, zoom: ZoomMode) -> QZoom:
    """The model with those branches alone that a method uses, so that a session over a picture pays for no others.

    Args:
        model: the model under test; it is not changed.
        method: which way of looking.
        zoom: what "qzoom" does; "never" uses no branch at all, whatever the method.
    """
    from qzoom.model import QZoom

    own = model.engine
    gate = own.gate if method.asks_gate and zoom == "auto" else None
    region = own.region if method.needs_region and zoom != "never" else None
    if gate is own.gate and region is own.region:
        return model
    return QZoom(dataclasses.replace(own, gate=gate, region=region), model.name, model.image_limits)


def answer_of(said: Answer, seconds: float, extra: dict[str, float] | None = None) -> MethodAnswer:
    """The engine's answer as a method's."""
    return MethodAnswer(
        said.text, said.finish_reason, said.gate, said.regions, said.usage, seconds, said.timing_ms, extra or {}
    )


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
    look: CoarseResult
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

    def beside(self, text: str, max_new_tokens: int | None = None) -> CoarseResult:
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

    def _answered(self, item: CoarseResult, row: DecodeRow) -> MethodAnswer:
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


@dataclass(frozen=True, slots=True)
class OwnWay:
    """The engine as it is; see `Method`.

    Args:
        name: of the method.
        zoom: how it looks; None takes the budget's.
    """

    name: str
    zoom: ZoomMode | None

    @property
    def zooms(self) -> bool:
        """All but the plain model."""
        return self.zoom != "never"

    @property
    def needs_region(self) -> bool:
        """All but the plain model."""
        return self.zooms

    @property
    def asks_gate(self) -> bool:
        """Only where the budget leaves the choice."""
        return self.zoom is None

    def answer(self, model: QZoom, images: Any, question: EvalQuestion, budget: Budget) -> MethodAnswer:
        """See `Method.answer`."""
        options = budget.of_question(self.zoom or budget.zoom)
        start = time.perf_counter()
        if isinstance(images, Session):
            said = images.ask(question.question, **options)
        else:
            said = model.ask(images, question.question, coarse_tokens=budget.coarse, **options)
        return answer_of(said, time.perf_counter() - start)


QZOOM = OwnWay("qzoom", None)
PLAIN = OwnWay("plain", "never")
ALWAYS = OwnWay("always", "always")
