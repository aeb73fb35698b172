"""Pictures to prompts, the coarse pass, the gate's decision and the region proposal.

Every step takes a batch of requests, and in a batch every request decides for itself. `engine/flow.py` calls them in
order; `Stopwatch` adds up what each of them took.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.prompt import build_prompt
from qzoom.engine.request import Request, check_heads, check_length, check_requests, coarse_budgets
from qzoom.engine.state import (
    Engine,
    State,
    advance_gate,
    advance_region,
    advance_shared,
    advance_upper,
    map_inputs,
)
from qzoom.heads.boxes import MapBox, boxes_from_maps, picture_bounds
from qzoom.heads.region_map import RegionMap, mean_head_logits, peak_score, region_map
from qzoom.types import Answer, GateDecision, HeatMap, Perception, Region, TokenLogprob, Usage


class Stopwatch:
    """Adds up wall time by step name; on CUDA it waits for the device before reading the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._started = self._now()
        self._ms: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block under a name; repeated names add up."""
        begin = self._now()
        try:
            yield
        finally:
            self._ms[name] = self._ms.get(name, 0.0) + (self._now() - begin) * 1000

    def snapshot(self) -> dict[str, float]:
        """Steps so far in order, then "total" since the start."""
        return {**self._ms, "total": (self._now() - self._started) * 1000}

    def _now(self) -> float:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


_NOT_A_NUMBER = "is not a number (NaN or infinity), so the answer is from the coarse pass."


@dataclass(frozen=True, slots=True)
class CoarseResult:
    """What the coarse pass gave for one request."""

    request: Request  # what was asked
    state: State  # everything computed
    gate: GateDecision  # the decision; `zoomed` is the intention until the region is read
    maps: tuple[RegionMap, ...] = ()  # one per picture; empty when the region branch did not run
    boxes: tuple[MapBox, ...] = ()  # proposed boxes, best first

    def without_states(self, engine: Engine) -> CoarseResult:
        """What an answer's record needs: of the state, the prompt only."""
        return dataclasses.replace(self, state=State.empty(engine, self.state.prompt))


@torch.inference_mode()
def encode(engine: Engine, requests: Sequence[Request], clock: Stopwatch) -> list[State]:
    """Pictures to visual tokens to prompts, as states in which nothing else is computed yet.

    A request with a prefix starts from its state, whose pictures are encoded already (HeadsMissingError: zoom "always"
    asked of a model without a region branch; BudgetError: a token budget larger than what the model reads;
    QuestionError: a prompt longer than the model reads).
    """
    backbone = engine.backbone
    for request in requests:
        check_heads(engine, request.options.zoom)
    check_requests(engine, requests)
    images, budgets = [], []
    for request in requests:
        if request.prefix is None:
            images += [p.image for p in request.pictures]
            budgets += coarse_budgets(engine, request.options, request.pictures)
    with clock.step("vision"):
        features = iter(backbone.encode(images, budgets))
    states = []
    for request in requests:
        if request.prefix is None:
            pictures = [next(features) for _ in request.pictures]
        else:
            pictures = [span.features for span in request.prefix.prompt.spans]
        prompt = build_prompt(backbone, request.ids, pictures)
        check_length(len(prompt), request, backbone)
        states.append(State.empty(engine, prompt) if request.prefix is None else request.prefix.on(prompt))
    return states


@torch.inference_mode()
def gate(
    engine: Engine, requests: Sequence[Request], states: Sequence[State], clock: Stopwatch, *, everyone: bool = False
) -> list[CoarseResult]:
    """Decide for each request whether the coarse pass is enough; without a gate, "auto" always zooms.

    Where the region map decides (`ZoomConfig.decide_by`), "auto" wants to zoom until `propose` has seen the map. Where
    the coarse answer decides, its first tokens are generated here, and what that computed is kept. A score that is no
    number counts as none, does not zoom, and says so in the note.

    Args:
        everyone: run the gate for requests that do not ask it, too.
    """
    states = list(states)
    can_zoom = engine.region is not None
    asking = [i for i, r in enumerate(requests) if everyone or (r.options.zoom == "auto" and r.pictures and can_zoom)]
    scores: dict[int, float] = {}
    if asking and engine.gate is not None and engine.config.decide_by == "gate":
        with clock.step("gate"):
            advanced, hidden = advance_gate(engine, [states[i] for i in asking])
            probabilities = engine.gate.logit(torch.stack(hidden)).sigmoid().tolist()
        for i, state, score in zip(asking, advanced, probabilities, strict=True):
            states[i], scores[i] = state, score
    if asking and engine.config.decide_by == "answer":
        with clock.step("coarse_answer"):
            looked = answer_scores(engine, [states[i] for i in asking])
        for i, (state, score) in zip(asking, looked, strict=True):
            states[i], scores[i] = state, score
    return [
        CoarseResult(request, states[i], decide(engine, request, scores.get(i))) for i, request in enumerate(requests)
    ]


def answer_scores(engine: Engine, states: Sequence[State]) -> list[tuple[State, float]]:
    """States after the upper layers, each with the greatest doubt among the first tokens of its greedy answer.

    Whether the question zooms or not, the upper layers' states of its pictures are used again. The tokens after the
    first are generated a second time if they are the answer.
    """
    states, logits = advance_upper(engine, states)
    scores = [token_doubt(one) for one in logits]
    running, ends = dict(enumerate(states)), engine.backbone.eos_ids
    for _ in range(engine.config.answer_tokens - 1):
        drawn = {i: int(logits[i].argmax()) for i in running}
        running = {i: s.on(s.prompt.with_token(drawn[i])) for i, s in running.items() if drawn[i] not in ends}
        if not running:
            break
        ahead, found = advance_upper(engine, advance_shared(engine, list(running.values())))
        running = dict(zip(running, ahead, strict=True))
        for i, one in zip(running, found, strict=True):
            logits[i], scores[i] = one, max(scores[i], token_doubt(one))
    return list(zip(states, scores, strict=True))


def token_doubt(logits: Tensor, most: int = 64) -> float:
    """How little the likeliest token stands out: sigmoid of (mean - highest) / standard deviation of the top logits.

    It is 1 less the "answer separability" of SpecEyes (docs/method.md 3.1), from 0 (sure) to 0.5 (all alike).

    Args:
        logits: (vocabulary,).
        most: how many of the highest are compared.
    """
    top = logits.float().topk(min(most, logits.shape[-1])).values
    return float(((top.mean() - top[0]) / (top.std(correction=0) + 1e-6)).sigmoid())


def gate_threshold(engine: Engine, request: Request) -> float:
    """The score at which a question zooms: its own, else the checkpoint's."""
    own = request.options.gate_threshold
    return engine.config.gate_threshold if own is None else own


def decide(engine: Engine, request: Request, score: float | None) -> GateDecision:
    """What the score (None where nothing was asked) and the question's options decide."""
    zoom, threshold, note = request.options.zoom, gate_threshold(engine, request), ""
    zooms = zoom == "always" or (zoom == "auto" and (score is None or score >= threshold))
    if zoom == "always" and not request.pictures:
        note = "There is no picture to zoom into."
    elif zoom == "auto" and request.pictures and engine.region is None:
        zooms, note = False, "The model has no region branch, so the answer is from the coarse pass."
    if score is not None and not math.isfinite(score):
        score, note = None, f"The gate's score {_NOT_A_NUMBER}"
    return GateDecision(score, None if score is None else threshold, zooms and bool(request.pictures), note)


@torch.inference_mode()
def propose(
    engine: Engine, coarse: Sequence[CoarseResult], clock: Stopwatch, *, everyone: bool = False
) -> list[CoarseResult]:
    """Run the region branch and draw boxes for the requests that zoom.

    The map decides whether "auto" zooms where `ZoomConfig.decide_by` says so. A map that is empty or has NaN takes the
    intention to zoom back and says so in the gate's note.

    Args:
        everyone: draw boxes for requests that do not zoom, too.
    """
    out = list(coarse)
    chosen = [i for i, item in enumerate(out) if item.gate.zoomed or (everyone and engine.region is not None)]
    if not chosen:
        return out
    with clock.step("region"):
        for i, state in zip(chosen, advance_region(engine, [out[i].state for i in chosen]), strict=True):
            out[i] = with_maps(engine, dataclasses.replace(out[i], state=state), region_maps(engine, state))
    return out


def with_maps(engine: Engine, item: CoarseResult, maps: tuple[RegionMap, ...]) -> CoarseResult:
    """A coarse pass with its region maps and the boxes drawn from them; see `propose`."""
    sizes = [picture.size_px for picture in item.request.pictures]
    decision, note = item.gate, "No region stood out, so the answer is from the coarse pass."
    if not all(math.isfinite(float(m.blurred.sum())) for m in maps):
        maps, note = (), f"The region map {_NOT_A_NUMBER}"
        decision = dataclasses.replace(decision, note=note)
    elif maps and engine.config.decide_by == "map":
        decision = decide(engine, item.request, peak_score([m.blurred for m in maps]))
    boxes = propose_boxes(engine, maps, sizes, item.request.options.region_threshold)
    if decision.zoomed and not boxes:
        decision = dataclasses.replace(decision, zoomed=False, note=note)
    return CoarseResult(item.request, item.state, decision, maps, boxes)


def propose_boxes(
    engine: Engine, maps: Sequence[RegionMap], sizes_px: Sequence[tuple[int, int]], threshold: float | None = None
) -> tuple[MapBox, ...]:
    """Where to zoom, best first: the one place where region maps become boxes, in answering and in training alike.
    `threshold`: see `ZoomConfig.region_threshold`; None takes the checkpoint's."""
    return boxes_from_maps(
        [m.blurred for m in maps],
        sizes_px,
        threshold=engine.config.region_threshold if threshold is None else threshold,
        rule=engine.config.box,
        token_px=engine.backbone.token_px,
        padded=engine.backbone.square_padding is not None,
    )


def region_logits(engine: Engine, state: State) -> tuple[Tensor, ...]:
    """Raw mean-head logits (rows, columns) of every picture, from the last prompt token's query (docs/method.md 3).
    `engine`: with a region branch. `state`: after `advance_region`; gradients pass."""
    if engine.region is None or state.region_last is None or not state.keys:
        return ()
    backbone, last = engine.backbone, engine.region.layers[-1]
    hidden, rotary = map_inputs(engine, state.region_last[None, None], state.prompt.positions[:, None, -1:])
    query = backbone.query(last, hidden, rotary)[0, :, 0]
    spans = (s for s in state.prompt.spans if s.role == "coarse")
    joined = engine.config.map_heads == "joined"
    return tuple(
        mean_head_logits(query, keys, joined=joined).view(span.features.grid)
        for span, keys in zip(spans, state.keys, strict=True)
    )


def region_maps(engine: Engine, state: State) -> tuple[RegionMap, ...]:
    """The map of every picture: logits, sinks removed, blurred."""
    return tuple(
        region_map(logits, sinks, (logits.shape[0], logits.shape[1]), engine.config)
        for logits, sinks in zip(region_logits(engine, state), sink_logits(engine, state), strict=False)
    )


def sink_logits(engine: Engine, state: State) -> tuple[Tensor | None, ...]:
    """Logits (n,) of the first token's query for every picture; None where the sink rule needs none."""
    if engine.config.sink != "first_token" or state.sink_query is None:
        return (None,) * len(state.keys)
    return tuple(mean_head_logits(state.sink_query, keys) for keys in state.keys)


def usage_of(engine: Engine, item: CoarseResult, regions: Sequence[Region], completion: int) -> Usage:
    """Tokens paid for a request with these regions and so many generated tokens."""
    spans = item.state.prompt.spans
    opening = len(engine.backbone.image_delimiters[0])
    prefix, read = item.request.prefix, sum(r.tokens for r in regions)
    return Usage(
        coarse_tokens=sum(s.stop - s.start for s in spans if s.role == "coarse"),
        region_tokens=read,
        prompt_tokens=len(item.state.prompt) + read - sum(s.stop - s.start for s in spans if s.role == "region"),
        completion_tokens=completion,
        reused_tokens=_reused(item, prefix, opening) if prefix is not None else 0,
    )


def _reused(item: CoarseResult, prefix: State, opening: int) -> int:
    """Tokens of the session's prefix that came before the first inserted region and its `opening` tokens."""
    inserted = [s.start - opening for s in item.state.prompt.spans if s.role == "region"]
    return min([prefix.shared.length, *inserted])


def make_region(request: Request, box: MapBox, features: VisualFeatures | None = None) -> Region:
    """The record of a box, with its page where the picture is one. `features`: of the crop, if it was read."""
    page = request.pictures[box.image].page
    size_px, tokens = (features.size_px, features.tokens.shape[0]) if features is not None else (None, 0)
    place: dict[str, Any] = {} if page is None else {"page": page.number, "box_pt": page.points(box.box)}
    return Region(box.box, box.score, box.image, size_px, tokens, **place)


def heat_maps(engine: Engine, item: CoarseResult) -> tuple[HeatMap, ...]:
    """The blurred map of every picture, without the cells that show nothing but padding."""
    maps = [m.blurred.cpu().numpy() for m in item.maps]
    if engine.backbone.square_padding is not None:
        for i, picture in enumerate(item.request.pictures[: len(maps)]):
            x0, y0, x1, y1 = picture_bounds(picture.size_px, maps[i].shape)
            maps[i] = maps[i][math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)]
    return tuple(HeatMap(values, i) for i, values in enumerate(maps))


def make_perception(engine: Engine, item: CoarseResult, clock: Stopwatch) -> Perception:
    """The record of a coarse pass."""
    return Perception(
        gate=item.gate,
        regions=tuple(make_region(item.request, b) for b in item.boxes),
        heat_maps=heat_maps(engine, item),
        image_sizes_px=tuple(p.size_px for p in item.request.pictures),
        usage=usage_of(engine, item, (), 0),
        timing_ms=clock.snapshot(),
    )


def make_answer(
    engine: Engine,
    item: CoarseResult,
    regions: Sequence[Region],
    clock: Stopwatch,
    *,
    text: str,
    tokens: Sequence[int],
    finish: Literal["", "stop", "length", "cancelled"],
    logprobs: Sequence[TokenLogprob] = (),
) -> Answer:
    """The record of what was generated for a request whose regions have been read."""
    pictures = item.request.pictures
    return Answer(
        text=text,
        tokens=tuple(tokens),
        logprobs=tuple(logprobs),
        gate=item.gate,
        regions=tuple(regions),
        heat_maps=heat_maps(engine, item),
        usage=usage_of(engine, item, regions, len(tokens)),
        timing_ms=clock.snapshot(),
        image_sizes_px=tuple(p.size_px for p in pictures),
        notes=tuple(note for p in pictures for note in p.notes),
        finish_reason=finish or "stop",
        question=item.request.conversation.question,
        cell_px=engine.backbone.token_px,
        images=tuple(p.image for p in pictures),
    )
