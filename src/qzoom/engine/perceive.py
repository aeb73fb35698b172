"""The coarse look, the gate's decision and the region proposal; in a batch every sample decides for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.engine.generate import Stopwatch
from qzoom.engine.prompt import Prompt, build_prompt
from qzoom.engine.request import Request, check_heads, check_length, check_requests, coarse_budget
from qzoom.engine.state import Engine, State, advance_gate, advance_region, advance_shared
from qzoom.heads.boxes import MapBox, boxes_from_maps
from qzoom.heads.region_map import RegionMap, mean_head_logits, region_map
from qzoom.types import GateDecision

__all__ = ["CoarseResult", "look", "propose", "region_logits", "region_maps"]


@dataclass(frozen=True, slots=True)
class CoarseResult:
    """What the coarse look gave for one request.

    Args:
        request: what was asked.
        state: everything computed.
        gate: the decision; `zoomed` is the intention until the region is read.
        maps: one per picture; empty when the region branch did not run.
        boxes: proposed boxes, best first.
    """

    request: Request
    state: State
    gate: GateDecision
    maps: tuple[RegionMap, ...] = ()
    boxes: tuple[MapBox, ...] = ()


@torch.inference_mode()
def look(
    engine: Engine, requests: Sequence[Request], clock: Stopwatch, *, perceive: bool = False
) -> list[CoarseResult]:
    """Encode, run the shared layers, ask the gate, and where it says so the region branch.

    Args:
        engine: backbone, branches, arithmetic.
        requests: one or more, of any sizes.
        clock: gets "vision", "shared_layers", "gate" and "region".
        perceive: run gate and region branch for every request, whatever is decided.

    Raises:
        HeadsMissingError: zooming asked of a model without a region branch.
        BudgetError: a token budget larger than what the model reads.
        QuestionError: a prompt longer than the model reads.
    """
    for request in requests:
        check_heads(engine, request.options.zoom)
    check_requests(engine, requests)
    prompts = _prompts(engine, requests, clock)
    states = [
        request.prefix.on(prompt) if request.prefix is not None else State.empty(engine, prompt)
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    with clock.step("shared_layers"):
        states = advance_shared(engine, states)
    looks = _decide(engine, requests, states, clock, perceive)
    chosen = [i for i, item in enumerate(looks) if item.gate.zoomed or (perceive and engine.region is not None)]
    if chosen:
        with clock.step("region"):
            for i, found in zip(chosen, propose(engine, [looks[i] for i in chosen]), strict=True):
                looks[i] = found
    return looks


def _prompts(engine: Engine, requests: Sequence[Request], clock: Stopwatch) -> list[Prompt]:
    backbone = engine.backbone
    images, budgets = [], []
    for request in requests:
        if request.prefix is None:
            images += [p.image for p in request.pictures]
            budgets += [coarse_budget(engine, request.options)] * len(request.pictures)
    with clock.step("vision"):
        features = iter(backbone.encode(images, budgets))
    prompts = []
    for request in requests:
        if request.prefix is None:
            own = [next(features) for _ in request.pictures]
        else:
            own = [span.features for span in request.prefix.prompt.spans]
        prompt = build_prompt(backbone, request.ids, own)
        check_length(len(prompt), request, backbone)
        prompts.append(prompt)
    return prompts


def _decide(
    engine: Engine, requests: Sequence[Request], states: list[State], clock: Stopwatch, perceive: bool
) -> list[CoarseResult]:
    """Gate scores for the requests that ask for one; without a gate, "auto" always zooms."""
    asked = [i for i, r in enumerate(requests) if perceive or (r.options.zoom == "auto" and r.pictures)]
    asked = asked if engine.gate is not None else []
    scores: dict[int, float] = {}
    if asked:
        with clock.step("gate"):
            advanced, hidden = advance_gate(engine, [states[i] for i in asked])
            probabilities = engine.gate.logit(torch.stack(hidden)).sigmoid().tolist()  # type: ignore[union-attr]
        for i, state, score in zip(asked, advanced, probabilities, strict=True):
            states[i], scores[i] = state, score
    out = []
    for i, request in enumerate(requests):
        options = request.options
        threshold = options.gate_threshold if options.gate_threshold is not None else engine.config.gate_threshold
        wanted = options.zoom == "always" or (options.zoom == "auto" and scores.get(i, 1.0) >= threshold)
        note = "There is no picture to zoom into." if options.zoom == "always" and not request.pictures else ""
        zoomed = wanted and bool(request.pictures)
        gate = GateDecision(scores.get(i), threshold if i in scores else None, zoomed, note)
        out.append(CoarseResult(request, states[i], gate))
    return out


def propose(engine: Engine, looks: Sequence[CoarseResult]) -> list[CoarseResult]:
    """Run the region branch and draw boxes; an empty map takes the intention to zoom back and says so."""
    states = advance_region(engine, [item.state for item in looks])
    out = []
    for item, state in zip(looks, states, strict=True):
        maps = region_maps(engine, state)
        options = item.request.options
        threshold = options.region_threshold if options.region_threshold is not None else engine.config.region_threshold
        boxes = boxes_from_maps(
            [m.blurred for m in maps],
            [p.size_px for p in item.request.pictures],
            threshold=threshold,
            rule=engine.config.box,
            token_px=engine.backbone.token_px,
        )
        gate = item.gate
        if gate.zoomed and not boxes:
            gate = dataclasses.replace(
                gate, zoomed=False, note="No region stood out, so the answer is from the coarse look."
            )
        out.append(CoarseResult(item.request, state, gate, maps, boxes))
    return out


def region_logits(engine: Engine, state: State) -> tuple[Tensor, ...]:
    """Raw mean-head logits (rows, columns) of every picture, from the last prompt token's query (method.md 3).

    Args:
        engine: with a region branch.
        state: after `advance_region`; gradients pass.
    """
    if engine.region is None or state.region_last is None or not state.keys:
        return ()
    backbone, last = engine.backbone, engine.region.layers[-1]
    hidden = state.region_last[None, None]
    rotary = backbone.rotary(hidden, state.prompt.positions[:, None, -1:])
    query = backbone.query(last, hidden, rotary)[0, :, 0]
    spans = (s for s in state.prompt.spans if s.role == "coarse")
    return tuple(
        mean_head_logits(query, keys).view(span.features.grid) for span, keys in zip(spans, state.keys, strict=True)
    )


def region_maps(engine: Engine, state: State) -> tuple[RegionMap, ...]:
    """The map of every picture: logits, sinks removed, blurred."""
    maps = []
    for logits, keys in zip(region_logits(engine, state), state.keys, strict=False):
        sinks = None
        if engine.config.sink == "first_token" and state.sink_query is not None:
            sinks = mean_head_logits(state.sink_query, keys)
        maps.append(region_map(logits, sinks, (logits.shape[0], logits.shape[1]), engine.config))
    return tuple(maps)
