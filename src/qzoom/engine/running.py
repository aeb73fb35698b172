"""Answers in the making: questions join and leave the running batch between decode steps (method.md 1).

`events` runs a fixed set of questions to their end; a server adds them as they come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from qzoom.engine.answer import make_answer, make_perception, prefill, read_regions
from qzoom.engine.decode import DecodeBatch, DecodeRow
from qzoom.engine.look import Look, look
from qzoom.engine.prefix_cache import PrefixCache, prefix_state
from qzoom.engine.request import Request
from qzoom.engine.state import Engine, State
from qzoom.engine.timing import Stopwatch
from qzoom.types import Region, StreamEvent

__all__ = ["Named", "RunningBatch", "events"]

Named = tuple[int, StreamEvent]
"""An event and the key of the request that it belongs to."""


@dataclass(frozen=True, slots=True)
class _Answering:
    """What an answer's record needs besides its decode row."""

    item: Look
    regions: tuple[Region, ...]
    clock: Stopwatch


class RunningBatch:
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

    def add(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None) -> Iterator[Named]:
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

    def _add(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes]) -> Iterator[Named]:
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

    def perceive(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None) -> list[Named]:
        """Gate and regions only: one "perception" each, and nothing joins the batch."""
        out: list[Named] = []
        for wave in _waves(requests, prefixes or {}):
            keys = list(wave)
            clock = Stopwatch(self._engine.backbone.device)
            known = [self._known(wave[key], (prefixes or {}).get(key)) for key in keys]
            for key, item in zip(keys, look(self._engine, known, clock, perceive=True), strict=True):
                self._keep((prefixes or {}).get(key), item, None)
                out.append((key, StreamEvent("perception", perception=make_perception(self._engine, item, clock))))
        return out

    def step(self) -> list[Named]:
        """One token for every request in the batch."""
        with ExitStack() as clocks:
            for clock in {id(a.clock): a.clock for a in map(self._answering.__getitem__, self.keys)}.values():
                clocks.enter_context(clock.step("decode"))
            pieces = self._batch.step()
        return [event for row, text in pieces for event in self._said(row, text)]

    def cancel(self, key: int) -> list[Named]:
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

    def _keep(self, prefix: bytes | None, item: Look, row: DecodeRow | None) -> None:
        if prefix and self._cache is not None and self._cache.wants(prefix, item):
            with torch.inference_mode():
                state = prefix_state(self._engine, item, None if row is None else row.cache)
            self._cache.put(prefix, state)

    def _said(self, row: DecodeRow, text: str) -> Iterator[Named]:
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
) -> Iterator[Named]:
    """Answer every request; events come as they happen, named by the request's index.

    Args:
        engine: backbone, branches, arithmetic.
        requests: one or more.
        cancel: asked between steps with a request's index; True ends that answer.
        eos_ids: tokens that end an answer; None uses the model's own.

    Yields:
        For each request one "perception", then "text" pieces, then one "answer".
    """
    batch = RunningBatch(engine, eos_ids=eos_ids)
    yield from batch.add(dict(enumerate(requests)))
    while batch.keys:
        for key in batch.keys:
            if cancel is not None and cancel(key):
                yield from batch.cancel(key)
        yield from batch.step()
