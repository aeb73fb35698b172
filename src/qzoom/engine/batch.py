"""Continuous batching: requests join and leave the running batch between decode steps (docs/method.md 1).

`events` runs a fixed set of requests to their end, `answer_all` any number of them in chunks that fit into memory; a
server adds them as they come.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain

import torch

from qzoom.engine.flow import KeyedEvent, answer, coarse_pass
from qzoom.engine.generate import DecodeBatch, DecodeRow, Prefilled
from qzoom.engine.perceive import Stopwatch, make_answer, make_perception
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.engine.request import Request, estimate_bytes
from qzoom.engine.reread import Draft, start_again
from qzoom.engine.state import Engine
from qzoom.errors import QZoomError, is_short_of_memory
from qzoom.types import Answer, StreamEvent

_log = logging.getLogger(__name__)


class ContinuousBatch:
    """Requests being answered together, each by the caller's key. Not for several threads at once. `eos_ids`: tokens
    that end an answer; None uses the model's own."""

    def __init__(
        self, engine: Engine, *, cache: PrefixCache | None = None, eos_ids: Sequence[int] | None = None
    ) -> None:
        self._engine = engine
        self._cache = PrefixCache(0) if cache is None else cache
        self._batch = DecodeBatch(engine.backbone, eos_ids)
        self._answering: dict[int, Prefilled] = {}
        self._drafts: dict[int, Draft] = {}  # answers that may be read again; nothing of them has been told
        self._preempted: dict[int, DecodeRow] = {}

    @property
    def keys(self) -> tuple[int, ...]:
        """Requests in the batch; preempted ones are not in it."""
        return tuple(row.key for row in self._batch.rows)

    def tokens(self, key: int) -> int:
        """Tokens that a running request has so far, those of both readings where it is read again."""
        if key in self._drafts:
            return self._drafts[key].tokens
        return next(len(row.tokens) for row in self._batch.rows if row.key == key)

    def add(self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None) -> Iterator[KeyedEvent]:
        """Run requests up to their first token, with which they join the batch; see `flow.answer`.

        Args:
            requests: by keys that are not in use.
            prefixes: `prefix_key` of those that may use the cache.

        Yields:
            For each one "perception", then its first "text" unless it may be read again, and its "answer" where it
            has ended already.

        Raises:
            QuestionError, BudgetError: a request that cannot run; none of them has joined then.
        """
        return answer(self._engine, requests, self._join, prefixes=prefixes or {}, cache=self._cache)

    def perceive(
        self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes] | None = None
    ) -> list[KeyedEvent]:
        """Gate and regions only: one "perception" each, and nothing joins the batch; arguments as in `add`."""
        out: list[KeyedEvent] = []
        for keys, prefix_keys, wave in self._cache.waves(requests, prefixes or {}):
            clock = Stopwatch(self._engine.backbone.device)
            coarse = coarse_pass(self._engine, wave, clock, everyone=True)
            for key, prefix, item in zip(keys, prefix_keys, coarse, strict=True):
                self._cache.store(prefix, self._engine, item)
                out.append((key, StreamEvent("perception", perception=make_perception(self._engine, item, clock))))
        return out

    def _join(self, prefilled: Sequence[Prefilled]) -> Iterator[KeyedEvent]:
        """Let requests join the batch and draw their first tokens."""
        rule = self._engine.config.reread
        for item in prefilled:
            self._answering[item.row.key] = dataclasses.replace(item, before=None)
            if rule is not None and item.before is not None:
                self._drafts[item.row.key] = Draft(item, rule)
        rows, clock = [item.row for item in prefilled], prefilled[0].clock
        del prefilled, item
        return self._started(rows, clock)

    def _started(self, rows: Sequence[DecodeRow], clock: Stopwatch) -> Iterator[KeyedEvent]:
        """Draw the first tokens of rows."""
        with clock.step("decode"):
            pieces = self._batch.start(rows)
        yield from self._advance(pieces)

    def run(self, cancel: Callable[[int], bool] | None = None) -> Iterator[KeyedEvent]:
        """Decode until every request in the batch has ended. `cancel`: asked between steps with a request's key; True
        ends that answer."""
        while self.keys:
            for key in self.keys:
                if cancel is not None and cancel(key):
                    yield from self.cancel(key)
            yield from self.step()

    def step(self) -> Iterator[KeyedEvent]:
        """One token for every request in the batch; it is over when all its events are taken. Second readings of
        unsure answers are prefilled at its end, after the events of the others."""
        with ExitStack() as clocks:
            for clock in {id(a.clock): a.clock for a in map(self._answering.__getitem__, self.keys)}.values():
                clocks.enter_context(clock.step("decode"))
            pieces = self._batch.step()
        yield from self._advance(pieces)

    def cancel(self, key: int) -> list[KeyedEvent]:
        """End a request, running or preempted: its "answer" says "cancelled", unless it is complete and was being read
        again."""
        row = self._preempted.pop(key, None)
        if row is not None:
            row.finish = "cancelled"
            text = row.stream.finish()
        else:
            row = next((row for row in self._batch.rows if row.key == key), None)
            if row is None:
                return []
            text = self._batch.cancel(key)
        draft = self._drafts.get(key)
        if draft is None:
            return list(self._events_of(row, text))
        draft.cancel(text)
        return list(self._settle(key))

    def abort(self, key: int) -> None:
        """Discard a request in any state; no event is emitted."""
        self._answering.pop(key, None)
        self._drafts.pop(key, None)
        if self._preempted.pop(key, None) is None:
            self._batch.cancel(key)

    def clear(self) -> None:
        """Discard every request but the preempted ones, whatever state the batch is in; no event is emitted."""
        self._batch.clear()
        self._answering = {key: self._answering[key] for key in self._preempted}
        self._drafts = {key: draft for key, draft in self._drafts.items() if key in self._preempted}

    def preempt(self, key: int) -> None:
        """Take a request out of the batch until `resume`; its place is free."""
        self._preempted[key] = self._batch.preempt(key)

    def resume(self, keys: Sequence[int]) -> None:
        """Let preempted requests continue with the next step; if there is no memory for them, they stay preempted."""
        self._batch.resume([self._preempted[key] for key in keys])
        for key in keys:
            del self._preempted[key]

    def _advance(self, pieces: Sequence[tuple[DecodeRow, str]]) -> Iterator[KeyedEvent]:
        """Tell new tokens, or keep them in drafts; unsure answers are read again, those together that came together."""
        unsure: dict[int, list[Draft]] = {}
        for row, text in pieces:
            draft = self._drafts.get(row.key)
            if draft is None:
                yield from self._events_of(row, text)
                continue
            state = draft.add(text)
            if state == "counts":
                yield from self._settle(row.key)
            elif state == "unsure":
                unsure.setdefault(id(draft.reading.clock), []).append(draft)
        for drafts in unsure.values():
            pieces = self._read_again(drafts)
            begun = {row.key for row, _ in pieces}
            for draft in drafts:
                key = draft.reading.row.key
                if key not in begun:
                    draft.cancel("")
                    yield from self._settle(key)
            yield from self._advance(pieces)

    def _read_again(self, drafts: Sequence[Draft]) -> list[tuple[DecodeRow, str]]:
        """Let second readings join, with the text of their first tokens; none where there is no memory for them."""
        rows, clock = start_again(self._engine, drafts), drafts[0].reading.clock
        try:
            with clock.step("decode"):
                return self._batch.start(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_short_of_memory(error):
                raise
            _log.exception("Memory was short for %d second readings; the first ones count.", len(rows))
            return []

    def _settle(self, key: int) -> Iterator[KeyedEvent]:
        """End a draft with the events of the reading that counts; the row of another one leaves the batch."""
        draft = self._drafts.pop(key)
        row = draft.reading.row
        if any(other.key == key and other is not row for other in self._batch.rows):
            self._batch.cancel(key)
        self._answering[key] = draft.reading
        yield from self._events_of(row, draft.text)

    def _events_of(self, row: DecodeRow, text: str) -> Iterator[KeyedEvent]:
        """A row's new text, and its answer or error when it has ended."""
        if text:
            yield row.key, StreamEvent("text", text=text, logprobs=row.new_logprobs())
        if row.error is not None:
            del self._answering[row.key]
            yield row.key, StreamEvent("error", error=row.error)
        elif row.finish:
            done = self._answering.pop(row.key)
            made = make_answer(
                self._engine,
                done.coarse,
                done.regions,
                done.clock,
                text=row.stream.text,
                tokens=row.tokens,
                finish=row.finish,
                logprobs=row.sampler.logprobs,
            )
            yield row.key, StreamEvent("answer", answer=made)


def events(
    engine: Engine,
    requests: Sequence[Request],
    *,
    cancel: Callable[[int], bool] | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Iterator[KeyedEvent]:
    """Answer every request; events come as they happen, named by the request's index.

    Args:
        cancel: asked between steps with a request's index; True ends that answer.
        eos_ids: tokens that end an answer; None uses the model's own.

    Yields:
        For each request one "perception", then "text" pieces, then one "answer" or "error".
    """
    batch = ContinuousBatch(engine, eos_ids=eos_ids)
    return chain(batch.add(dict(enumerate(requests))), batch.run(cancel))


def answer_events(engine: Engine, request: Request, cancel: Callable[[], bool] | None = None) -> Iterator[KeyedEvent]:
    """The events of one request; see `events`."""
    return events(engine, [request], cancel=None if cancel is None else lambda _: cancel())


def raise_error(event: StreamEvent) -> StreamEvent:
    """The event, unless it is an "error", which is raised."""
    if event.error is not None:
        raise event.error
    return event


_LEAST_BYTES = 256 * 2**20


def batch_bytes(engine: Engine) -> int:
    """Memory for the requests that run together: half of what is free on a GPU; on a CPU half of what the weights take,
    at least 256 MiB."""
    backbone = engine.backbone
    if backbone.device.type == "cuda":
        return int(torch.cuda.mem_get_info(backbone.device)[0]) // 2
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    return max(_LEAST_BYTES, weights // 2)


def answer_all(
    engine: Engine, requests: Sequence[Request], max_bytes: int | None = None
) -> Iterator[tuple[int, Answer | QZoomError]]:
    """Answer any number of requests, those about the same pictures one after the other and on one coarse pass.

    Args:
        max_bytes: estimated memory of the requests that run together; None takes `batch_bytes`. A request that needs
            more runs alone.

    Yields:
        Each request's index with its answer, or with the reason why it has none.
    """
    limit = batch_bytes(engine) if max_bytes is None else max_bytes
    keys = [prefix_key(engine, request) for request in requests]
    counts = Counter(keys)
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    cache = PrefixCache(limit // 4)
    chunk: dict[int, Request] = {}
    room = limit
    for index in sorted(range(len(requests)), key=lambda i: (first[keys[i]], i)):
        size = estimate_bytes(engine, requests[index])
        if chunk and size > room:
            yield from _answer_chunk(engine, chunk, keys, cache)
            chunk, room = {}, limit
        if counts[keys[index]] == 1:
            keys[index] = b""  # nobody else needs its prefix
        chunk[index] = requests[index]
        room -= size
    if chunk:
        yield from _answer_chunk(engine, chunk, keys, cache)


def _answer_chunk(
    engine: Engine, requests: Mapping[int, Request], prefixes: Sequence[bytes], cache: PrefixCache
) -> Iterator[tuple[int, Answer | QZoomError]]:
    """The answers of requests that run together; where that fails, each runs alone."""
    batch = ContinuousBatch(engine, cache=cache)
    left = dict(requests)
    try:
        for started in (batch.add(requests, {key: prefixes[key] for key in requests}), batch.run()):
            for key, event in started:
                result = event.answer or event.error
                if result is not None:
                    del left[key]
                    yield key, result
    except QZoomError as error:
        if len(requests) == 1:
            yield next(iter(requests)), error
            return
        for key, request in left.items():
            yield from _answer_chunk(engine, {key: request}, prefixes, cache)
