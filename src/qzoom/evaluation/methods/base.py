"""The common interface of all methods, and the engine's steps for methods that choose their own region.

All methods get the same images, question and token limits, and use the engine's prompt, crop, insertion and decoding.
They differ only in the choice of the region.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qzoom.data.samples import SampleQuestion
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import DecodeBatch, DecodeRow, prefill
from qzoom.engine.perceive import CoarseResult, Stopwatch, make_answer
from qzoom.engine.prompt import prefix_length
from qzoom.engine.request import Options, Request
from qzoom.engine.session import Session
from qzoom.engine.state import truncate
from qzoom.engine.zoom import zoom
from qzoom.heads.boxes import MapBox, map_box, picture_bounds
from qzoom.model import QZoom
from qzoom.types import Answer, Box, GateDecision, Region, SamplingParams, ZoomMode

Answered = tuple[Answer, dict[str, float]]
"""An answer, and what came on top of it: "upper_tokens" of its own coarse prompt, where the upper layers ran over it
before the zoom; of another question "other_tokens" of its prompt, "other_text_tokens" of these after the pictures, and
"completion_tokens"; "failures" (1 when a round gave nothing to use)."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to answer questions, zooming or not. One object answers any number of questions and keeps no state."""

    name: str
    # what `answer` does; None for the engine as it is
    run: Callable[..., Answered] | None = None
    zoom: ZoomMode | None = None  # the engine's mode; None takes that of the options
    # whether it reads regions, so that a total of visual tokens is divided between coarse view and regions
    zooms: bool = True
    needs_region: bool = False  # whether the model must have a region branch
    asks_gate: bool = False  # whether the model's gate decides, where the zoom is "auto"
    draws: bool = False  # whether it draws places, so that `run` takes a `seed`

    def answer(self, model: QZoom, images: Any, question: SampleQuestion, options: Options) -> Answered:
        """Answer one question.

        Args:
            images: pictures as `QZoom.ask` takes them, or a `Session` over them, whose coarse pass all its questions
                share.
            question: what to ask; its right answer is never read, its boxes only by the oracle.
            options: limits, thresholds and decoding; the zoom mode counts where the engine answers.

        Raises:
            QZoomError: the question cannot be asked.
        """
        if self.run is not None:
            return self.run(model, images, question, options)
        values = ask_kwargs(dataclasses.replace(options, zoom=self.zoom or options.zoom))
        if isinstance(images, Session):
            return images.ask(question.question, **values), {}
        return model.ask(images, question.question, coarse_tokens=options.coarse_tokens, **values), {}


QZOOM = Method("qzoom", needs_region=True, asks_gate=True)
PLAIN = Method("plain", zoom="never", zooms=False)
ALWAYS = Method("always", zoom="always", needs_region=True)


def ask_kwargs(options: Options) -> dict[str, Any]:
    """Options as keyword arguments of `Session.ask` and, the coarse limit aside, of `QZoom.ask`."""
    return {
        "zoom": options.zoom,
        "region_tokens": options.region_tokens,
        "gate_threshold": options.gate_threshold,
        "region_threshold": options.region_threshold,
        "max_new_tokens": options.sampling.max_new_tokens,
        "temperature": options.sampling.temperature,
        "seed": options.sampling.seed,
    }


def with_needed_branches(model: QZoom, method: Method, zoom: ZoomMode) -> QZoom:
    """The model with those branches alone that a method uses, so that a session pays for no others. `zoom`: the mode of
    "qzoom"; "never" uses no branch at all, whatever the method."""
    engine = model.engine
    gate = engine.gate if method.asks_gate and zoom == "auto" else None
    region = engine.region if method.needs_region and zoom != "never" else None
    if gate is engine.gate and region is engine.region:
        return model
    return QZoom(dataclasses.replace(engine, gate=gate, region=region), model.name, model.image_limits)


@dataclass(frozen=True, slots=True)
class Reading:
    """A question whose coarse pass is done."""

    model: QZoom
    coarse: CoarseResult  # the coarse pass over the question; nothing has been decided
    clock: Stopwatch
    extra: dict[str, float] = field(default_factory=dict)  # see `Answered`

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) of the first picture."""
        return self.coarse.request.pictures[0].size_px

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the first picture's coarse cells."""
        return self.coarse.state.prompt.spans[0].features.grid

    def other_question(self, text: str, max_new_tokens: int | None = None) -> CoarseResult:
        """The coarse pass over another question about the same pictures, which are not encoded or read again.
        Its tokens are noted in `extra`. `max_new_tokens`: of its answer; None keeps that of the options."""
        engine, request, state = self.model.engine, self.coarse.request, self.coarse.state
        system = next((m["content"][0]["text"] for m in request.conversation.messages if m["role"] == "system"), None)
        conversation = read_conversation([None] * len(request.pictures), text, system)
        ids = tuple(ChatEncoder(engine.backbone).encode(conversation))
        end = prefix_length(engine.backbone, state.prompt)
        prompt = dataclasses.replace(
            state.prompt, ids=state.prompt.ids[:end], positions=state.prompt.positions[:, :end]
        )
        options = request.options
        if max_new_tokens is not None:
            options = dataclasses.replace(options, sampling=SamplingParams(max_new_tokens=max_new_tokens))
        other = Request(conversation, ids, request.pictures, options, truncate(state, end).on(prompt))
        item = coarse_pass(engine, [other], self.clock)[0]
        self.extra.update(other_tokens=len(item.state.prompt), other_text_tokens=len(item.state.prompt) - end)
        return item

    def answer_coarse(self, gate: GateDecision | None = None, row: DecodeRow | None = None) -> Answered:
        """Answer from the coarse pass."""
        item = dataclasses.replace(self.coarse, gate=gate or GateDecision(None, None, False))
        return self._decoded(item, (), row or prefill(self.model.engine, [item], self.clock)[0])

    def answer_zoomed(self, boxes: Sequence[MapBox], gate: GateDecision | None = None) -> Answered:
        """Answer with regions read at high resolution."""
        engine = self.model.engine
        item = dataclasses.replace(self.coarse, gate=gate or GateDecision(None, None, True), boxes=tuple(boxes))
        zoomed, regions = zoom(engine, [item], self.clock)
        return self._decoded(zoomed[0], regions[0], prefill(engine, zoomed, self.clock)[0])

    def _decoded(self, item: CoarseResult, regions: Sequence[Region], row: DecodeRow) -> Answered:
        decode_row(self.model, row, self.clock)
        answer = make_answer(
            self.model.engine, item, regions, self.clock, text=row.stream.text, tokens=row.tokens, finish=row.finish
        )
        return answer, dict(self.extra)


def start(model: QZoom, images: Any, question: SampleQuestion, options: Options) -> Reading:
    """Do the coarse pass over a question, without gate and region branch."""
    values = ask_kwargs(dataclasses.replace(options, zoom="never"))
    if isinstance(images, Session):
        request = images.request(question.question, **values)
    else:
        request = model.request(images, question.question, coarse_tokens=options.coarse_tokens, **values)
    clock = Stopwatch(model.engine.backbone.device)
    return Reading(model, coarse_pass(model.engine, [request], clock)[0], clock)


def decode_row(model: QZoom, row: DecodeRow, clock: Stopwatch) -> None:
    """Generate until the row ends; text and tokens stay on it (CheckpointError: the model's output is not a number)."""
    batch = DecodeBatch(model.engine.backbone)
    with clock.step("decode"):
        batch.start([row])
        while batch.rows:
            batch.step()
    if row.error is not None:
        raise row.error


def box_on(reading: Reading, box: Box, margin_cells: float = 0.0) -> MapBox:
    """A box in original pixels of the first picture as the engine reads it. `box`: xyxy, half-open. `margin_cells`:
    coarse cells added on every side."""
    (width, height), (rows, columns) = reading.size_px, reading.grid
    engine = reading.model.engine
    padded = engine.backbone.square_padding is not None
    left, top, right, bottom = picture_bounds(reading.size_px, reading.grid) if padded else (0, 0, columns, rows)
    x, y = (right - left) / width, (bottom - top) / height
    rule = dataclasses.replace(engine.config.box, scaling="exact", margin_cells=margin_cells)
    cells = (left + box[0] * x, top + box[1] * y, left + box[2] * x, top + box[3] * y)
    return map_box(cells, reading.grid, reading.size_px, rule=rule, token_px=engine.backbone.token_px, padded=padded)
