"""The steps between the look and the decoding, and the records of what came out (method.md 1).

Answers in the making: questions join and leave the running batch between decode steps (method.md 1).

`events` runs a fixed set of questions to their end; a server adds them as they come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.generate import DecodeBatch, DecodeRow, Sampler, Stopwatch, TextStream
from qzoom.engine.lru import LRUCache
from qzoom.engine.perceive import CoarseResult, look
from qzoom.engine.prefix_cache import PrefixCache, prefix_state
from qzoom.engine.request import Request, check_length, fit_regions
from qzoom.engine.state import Engine, State, advance_shared, advance_upper, truncate
from qzoom.engine.zoom import Crop, RegionBlock, encode_crops, insert_regions
from qzoom.types import Answer, HeatMap, Perception, Region, StreamEvent, Usage

__all__ = [
    "ContinuousBatch",
    "KeyedEvent",
    "events",
    "make_answer",
    "make_perception",
    "perceive",
    "prefill",
    "read_regions",
]


def perceive(engine: Engine, requests: Sequence[Request]) -> list[Perception]:
    """Gate and regions of every request, without an answer."""
    clock = Stopwatch(engine.backbone.device)
    looks = look(engine, requests, clock, perceive=True)
    return [make_perception(engine, item, clock) for item in looks]


@torch.inference_mode()
def read_regions(
    engine: Engine,
    looks: Sequence[CoarseResult],
    clock: Stopwatch,
    prefixes: Sequence[bytes] = (),
    kept: LRUCache[VisualFeatures] | None = None,
) -> tuple[list[CoarseResult], list[tuple[Region, ...]]]:
    """Crop, encode and insert the regions of the looks that zoom; the shared layers run over what is new.

    Args:
        engine: backbone and arithmetic.
        looks: one or more.
        clock: gets "region_vision" and "region_layers".
        prefixes: `prefix_key` of every look, where regions may be kept.
        kept: features of regions that were read before (see `encode_crops`).

    Returns:
        The looks with their new states, and what was read for each.

    Raises:
        QuestionError: with one region of the fewest tokens allowed the prompt is longer than the model reads.
    """
    out, regions = list(looks), [tuple[Region, ...]() for _ in looks]
    chosen = [i for i, item in enumerate(looks) if item.gate.zoomed]
    if not chosen:
        return out, regions
    crops: list[Crop] = []
    for i in chosen:
        item = looks[i]
        boxes, budgets = fit_regions(engine, item.request, len(item.state.prompt), item.boxes)
        out[i] = dataclasses.replace(item, boxes=boxes)
        prefix = prefixes[i] if prefixes else b""
        pictures = item.request.pictures
        crops += [
            Crop(pictures[b.image].image, b.image, b.box, own, prefix) for b, own in zip(boxes, budgets, strict=True)
        ]
    with clock.step("region_vision"):
        features = iter(encode_crops(engine.backbone, crops, kept))
    states = []
    for i in chosen:
        item = out[i]
        blocks = [RegionBlock(b.image, b.cells, next(features)) for b in item.boxes]
        prompt, reused = insert_regions(engine.backbone, item.state.prompt, blocks, engine.config)
        check_length(len(prompt), item.request, engine.backbone)
        states.append(truncate(item.state, reused).on(prompt))
        regions[i] = tuple(
            Region(b.box, b.score, b.image, block.features.size_px, block.features.tokens.shape[0])
            for b, block in zip(item.boxes, blocks, strict=True)
        )
    with clock.step("region_layers"):
        for i, state in zip(chosen, advance_shared(engine, states), strict=True):
            out[i] = dataclasses.replace(out[i], state=state)
    return out, regions


@torch.inference_mode()
def prefill(engine: Engine, looks: Sequence[CoarseResult], clock: Stopwatch) -> list[DecodeRow]:
    """Layers K..N-1; zoomed and plain prompts run as two batches, since their lengths differ most.

    Returns:
        One row per look, keyed by its index, ready for a `DecodeBatch`.
    """
    found: dict[int, tuple[State, Tensor]] = {}
    with clock.step("upper_layers"):
        for zoomed in (False, True):
            group = [i for i, item in enumerate(looks) if item.gate.zoomed == zoomed]
            if group:
                states, logits = advance_upper(engine, [looks[i].state for i in group])
                found |= dict(zip(group, zip(states, logits, strict=True), strict=True))
    rows = []
    for i, item in enumerate(looks):
        state, first_logits = found[i]
        params = item.request.options.sampling
        rows.append(
            DecodeRow(
                key=i,
                cache=state.shared.cache.merged(state.upper.cache),
                length=len(state.prompt),
                position=state.prompt.next_position,
                logits=first_logits,
                params=params,
                sampler=Sampler(params),
                stream=TextStream(engine.backbone.tokenizer, params.stop),
            )
        )
    return rows


def _usage(engine: Engine, item: CoarseResult, regions: Sequence[Region], completion: int) -> Usage:
    spans = item.state.prompt.spans
    opening = len(engine.backbone.image_delimiters[0])
    prefix = item.request.prefix
    return Usage(
        coarse_tokens=sum(s.stop - s.start for s in spans if s.role == "coarse"),
        region_tokens=sum(r.tokens for r in regions),
        prompt_tokens=len(item.state.prompt),
        completion_tokens=completion,
        reused_tokens=_reused(item, prefix, opening) if prefix is not None else 0,
    )


def _reused(item: CoarseResult, prefix: State, opening: int) -> int:
    """Tokens of the session's prefix that came before the first inserted region and its `opening` tokens."""
    inserted = [s.start - opening for s in item.state.prompt.spans if s.role == "region"]
    return min([prefix.shared.length, *inserted])


def _heat_maps(item: CoarseResult) -> tuple[HeatMap, ...]:
    return tuple(HeatMap(m.blurred.cpu().numpy(), i) for i, m in enumerate(item.maps))


def make_perception(engine: Engine, item: CoarseResult, clock: Stopwatch) -> Perception:
    """The record of a look."""
    return Perception(
        gate=item.gate,
        regions=tuple(Region(b.box, b.score, b.image) for b in item.boxes),
        heat_maps=_heat_maps(item),
        image_sizes_px=tuple(p.size_px for p in item.request.pictures),
        usage=_usage(engine, item, (), 0),
        timing_ms=clock.snapshot(),
    )


def make_answer(
    engine: Engine, item: CoarseResult, regions: tuple[Region, ...], row: DecodeRow, clock: Stopwatch
) -> Answer:
    """The record of a decoded row."""
    return Answer(
        text=row.stream.text,
        tokens=tuple(row.tokens),
        gate=item.gate,
        regions=regions,
        heat_maps=_heat_maps(item),
        usage=_usage(engine, item, regions, len(row.tokens)),
        timing_ms=clock.snapshot(),
        image_sizes_px=tuple(p.size_px for p in item.request.pictures),
        notes=tuple(note for p in item.request.pictures for note in p.notes),
        finish_reason=row.finish or "stop",
        question=item.request.conversation.question,
        cell_px=engine.backbone.token_px,
        images=tuple(p.image for p in item.request.pictures),
    )


KeyedEvent = tuple[int, StreamEvent]
"""An event and the key of the request that it belongs to."""


@dataclass(frozen=True, slots=True)
class _Answering:
    """What an answer's record needs besides its decode row."""

    item: CoarseResult
    regions: tuple[Region, ...]
    clock: Stopwatch


class ContinuousBatch:
    """Requests being answered together, each by the caller's key. Not for several threads at once.

    Args:
        engine: backbone, branches, arithmetic.
        cache: where prefixes are kept; None keeps none.
        eos_ids: tokens that end an answer; None uses the model's own.
    """

    def __init__(
        self, engine: Engine, *, cache: PrefixCache | None = None, eos_ids: Sequence[int] | None = None
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._batch = DecodeBatch(engine.backbone, eos_ids)
        self._answering: dict[int, _Answering] = {}
        self._parked: dict[int, DecodeRow] = {}

    @property
    def keys(self) -> tuple[int, ...]:
        """Requests in the batch; parked ones are not in it."""
        return tuple(row.key for row in self._batch.rows)

    def tokens(self, key: int) -> int:
        """Tokens that a running request has so far."""
        return next(len(row.tokens) for row in self._batch.rows if row.key == key)

    def add(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None) -> Iterator[KeyedEvent]:
        """Look, read the regions and prefill; the requests then join the batch with their first token.

        Args:
            requests: by keys that are not in use.
            prefixes: `prefix_key` of those that may use the cache.

        Yields:
            For each one "perception", then its first "text", and its "answer" where it has ended already.

        Raises:
            QuestionError, BudgetError: a request that cannot run; none of them has joined then.
        """
        for wave in _waves(requests, prefixes or {}):
            yield from self._add(wave, prefixes or {})

    def _add(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes]) -> Iterator[KeyedEvent]:
        engine, keys = self._engine, list(requests)
        clock = Stopwatch(engine.backbone.device)
        seen = look(engine, [self._known(requests[key], prefixes.get(key)) for key in keys], clock)
        for key, item in zip(keys, seen, strict=True):
            yield key, StreamEvent("perception", perception=make_perception(engine, item, clock))
        kept = None if self._cache is None else self._cache.regions
        looks, regions = read_regions(engine, seen, clock, [prefixes.get(key) or b"" for key in keys], kept)
        rows = prefill(engine, looks, clock)
        for key, item, row in zip(keys, seen, rows, strict=True):
            self._keep(prefixes.get(key), item, row)
        for key, item, read, row in zip(keys, looks, regions, rows, strict=True):
            # From here on the row owns what was computed; an answer's record needs the prompt only.
            item = dataclasses.replace(item, state=State.empty(engine, item.state.prompt))
            self._answering[key] = _Answering(item, read, clock)
            row.key = key
        del seen, looks
        with clock.step("decode"):
            pieces = self._batch.start(rows)
        for row, text in pieces:
            yield from self._said(row, text)

    def perceive(
        self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None
    ) -> list[KeyedEvent]:
        """Gate and regions only: one "perception" each, and nothing joins the batch."""
        out: list[KeyedEvent] = []
        for wave in _waves(requests, prefixes or {}):
            keys = list(wave)
            clock = Stopwatch(self._engine.backbone.device)
            known = [self._known(wave[key], (prefixes or {}).get(key)) for key in keys]
            for key, item in zip(keys, look(self._engine, known, clock, perceive=True), strict=True):
                self._keep((prefixes or {}).get(key), item, None)
                out.append((key, StreamEvent("perception", perception=make_perception(self._engine, item, clock))))
        return out

    def step(self) -> list[KeyedEvent]:
        """One token for every request in the batch."""
        with ExitStack() as clocks:
            for clock in {id(a.clock): a.clock for a in map(self._answering.__getitem__, self.keys)}.values():
                clocks.enter_context(clock.step("decode"))
            pieces = self._batch.step()
        return [event for row, text in pieces for event in self._said(row, text)]

    def cancel(self, key: int) -> list[KeyedEvent]:
        """End a request, running or parked: its "answer" says "cancelled"."""
        parked = self._parked.pop(key, None)
        if parked is not None:
            parked.finish = "cancelled"
            return list(self._said(parked, parked.stream.finish()))
        row = next((row for row in self._batch.rows if row.key == key), None)
        return [] if row is None else list(self._said(row, self._batch.cancel(key)))

    def forget(self, key: int) -> None:
        """Drop a request without a word, whatever became of it."""
        self._answering.pop(key, None)
        if self._parked.pop(key, None) is None:
            self._batch.cancel(key)

    def park(self, key: int) -> None:
        """Take a request out of the batch until `resume`; its place is free."""
        self._parked[key] = self._batch.park(key)

    def resume(self, keys: Iterable[int]) -> None:
        """Let parked requests go on with the next step."""
        self._batch.resume([self._parked.pop(key) for key in keys])

    def _known(self, request: Request, prefix: bytes | None) -> Request:
        """The request with the prefix that is held, if any."""
        if not prefix or self._cache is None or request.prefix is not None:
            return request
        state = self._cache.get(prefix)
        return request if state is None else dataclasses.replace(request, prefix=state)

    def _keep(self, prefix: bytes | None, item: CoarseResult, row: DecodeRow | None) -> None:
        if prefix and self._cache is not None and self._cache.wants(prefix, item):
            with torch.inference_mode():
                state = prefix_state(self._engine, item, None if row is None else row.cache)
            self._cache.put(prefix, state)

    def _said(self, row: DecodeRow, text: str) -> Iterator[KeyedEvent]:
        """A row's new text, and its answer when it has ended."""
        if text:
            yield row.key, StreamEvent("text", text=text)
        if row.finish:
            known = self._answering.pop(row.key)
            answer = make_answer(self._engine, known.item, known.regions, row, known.clock)
            yield row.key, StreamEvent("answer", answer=answer)


def _waves(requests: Mapping[int, Request], prefixes: Mapping[int, bytes]) -> Iterator[dict[int, Request]]:
    """The requests in order, cut so that those with a prefix in common come after the one that computes it."""
    left = dict(requests)
    while left:
        first: dict[bytes, int] = {}
        for key in left:
            first.setdefault(prefixes.get(key) or b"", key)
        wave = [key for key in left if not prefixes.get(key) or first[prefixes[key]] == key]
        yield {key: left.pop(key) for key in wave}


def events(
    engine: Engine,
    requests: Sequence[Request],
    *,
    cancel: Callable[[int], bool] | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Iterator[KeyedEvent]:
    """Answer every request; events come as they happen, named by the request's index.

    Args:
        engine: backbone, branches, arithmetic.
        requests: one or more.
        cancel: asked between steps with a request's index; True ends that answer.
        eos_ids: tokens that end an answer; None uses the model's own.

    Yields:
        For each request one "perception", then "text" pieces, then one "answer".
    """
    batch = ContinuousBatch(engine, eos_ids=eos_ids)
    yield from batch.add(dict(enumerate(requests)))
    while batch.keys:
        for key in batch.keys:
            if cancel is not None and cancel(key):
                yield from batch.cancel(key)
        yield from batch.step()
