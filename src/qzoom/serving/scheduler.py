"""One worker thread that owns the model and keeps a continuous batch of everybody's questions.

Between two decode steps it drops requests that were cancelled or ran out of time, starts waiting ones (their coarse
passes and zooms run as one batch) and, when slots are short, preempts long answers in favour of waiting requests.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.flow import KeyedEvent
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.engine.request import Request, check_requests, coarse_counts
from qzoom.errors import DeadlineError, InternalError, QueueFullError, QZoomError, StoppingError
from qzoom.model import QZoom
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import StreamEvent

Listener = Callable[[StreamEvent | QZoomError], None]
"""Called on the worker thread; must not block."""

_PREEMPTED = 2  # answers that may be preempted, in multiples of the slots; each holds its keys and values
_IDLE_S = 0.5  # how often an idle worker renews its heartbeat
_FAILED = "The server failed while it answered; its log says more."
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RequestHandle:
    """A submitted request: `cancel` for its owner, the rest for the scheduler."""

    key: int  # its number in the batch
    request: Request  # for the engine
    prefix: bytes  # key of the prefix cache
    listener: Listener  # gets its events
    deadline: float | None  # on the monotonic clock; None for none
    deadline_s: float  # the same in seconds from its arrival, for the error text
    perceive: bool  # gate and regions only
    visual_tokens: int  # of its coarse pass
    wake: threading.Condition  # the scheduler's lock
    slice_start: int = 0  # number of tokens at which it last got a slot
    started: bool = False
    perceived: bool = False
    cancelled: bool = False
    ended: bool = False

    def cancel(self) -> None:
        """End it before the next decode step; from any thread, any number of times."""
        with self.wake:
            self.cancelled = True
            self.wake.notify()


class Scheduler:
    """Continuous batching over one model. `model`: used by the worker thread only, from `start` on."""

    def __init__(self, model: QZoom, limits: SchedulerLimits | None = None) -> None:
        self.limits = limits or SchedulerLimits()
        self.cache = PrefixCache(self.limits.cache_bytes)
        self._model = model
        self._batch = ContinuousBatch(model.engine, cache=self.cache)
        self._keys = itertools.count()
        self._wake = threading.Condition()
        self._ready: deque[RequestHandle] = deque()  # without a slot: new and preempted ones, in order
        self._active: dict[int, RequestHandle] = {}  # in the batch
        self._open = True
        self._stop = False
        self._heartbeat = time.monotonic()
        self._pace_s = 1.0  # seconds between two finished requests, smoothed
        self._finished_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="qzoom-scheduler", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that have started and not ended."""
        with self._wake:
            return len(self._active) + sum(handle.started for handle in self._ready)

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        with self._wake:
            return sum(not handle.started for handle in self._ready)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the worker's last step."""
        return time.monotonic() - self._heartbeat

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    def submit(
        self,
        request: Request,
        listener: Listener,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
        perceive: bool = False,
    ) -> RequestHandle:
        """Queue a request. Hashes its pictures, so call it where decoding is done, not on an event loop.

        Args:
            listener: gets "perception", "text" and one last "answer" event, or a `QZoomError` as the last one; with
                `perceive` one "perception" and nothing else.
            tenant: prefixes are shared within a tenant only.
            deadline_s: seconds from now until it fails with `DeadlineError`; None waits.
            perceive: gate and regions only.

        Raises:
            QueueFullError: too many wait already.
            StoppingError: the scheduler is closing.
            QuestionError, BudgetError: it cannot fit into what the model reads.
        """
        engine = self._model.engine
        check_requests(engine, [request])
        handle = RequestHandle(
            key=next(self._keys),
            request=request,
            prefix=prefix_key(engine, request, tenant) if self.limits.cache_bytes else b"",
            listener=listener,
            deadline=None if deadline_s is None else time.monotonic() + deadline_s,
            deadline_s=deadline_s or 0.0,
            perceive=perceive,
            visual_tokens=sum(coarse_counts(engine, request)),
            wake=self._wake,
        )
        with self._wake:
            if not self._open:
                raise StoppingError("The server is shutting down; send the request to another one or later.")
            waiting = sum(not other.started for other in self._ready)
            if waiting >= self.limits.queue:
                wait_s = max(1.0, waiting * self._pace_s)
                raise QueueFullError(f"{waiting} requests wait already; try again in {wait_s:.0f} s.", wait_s)
            self._ready.append(handle)
            self._wake.notify()
        return handle

    def close(self, drain_s: float) -> None:
        """Refuse new requests, let the others finish for up to `drain_s` seconds, end the rest and the thread."""
        with self._wake:
            self._open = False
            self._wake.wait_for(lambda: not self._ready and not self._active, drain_s)
            self._stop = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                if not self._stop and not self._ready and not self._active:
                    self._wake.notify_all()
                    self._wake.wait(_IDLE_S)
                stop = self._stop
            self._heartbeat = time.monotonic()
            if stop:
                self._end_all()
                return
            try:
                self._turn()
            except QZoomError as error:
                self._fail_active(error)
            except Exception:
                _log.exception("A step of %d requests failed.", len(self._active))
                self._fail_active(InternalError(_FAILED))

    def _turn(self) -> None:
        self._drop()
        self._preempt()
        self._admit()
        if self._batch.keys:
            self._deliver(self._batch.step())

    def _fail_active(self, error: QZoomError) -> None:
        """End every request that has a slot, so that the worker goes on with the others."""
        self._batch.clear()
        with self._wake:
            handles = list(self._active.values())
        for handle in handles:
            self._batch.abort(handle.key)
            self._end(handle, error)

    def _drop(self) -> None:
        """End requests that were cancelled or ran out of time."""
        now = time.monotonic()
        for handle in self._all():
            late = handle.deadline is not None and now > handle.deadline
            if not handle.cancelled and not late:
                continue
            if handle.cancelled:
                self._cancel(handle, "The request was cancelled before it began.")
            else:
                self._run_out(handle)

    def _preempt(self) -> None:
        """Where slots are short, preempt the answers that have had their time slice in favour of waiting ones."""
        with self._wake:
            short = len(self._active) + len(self._ready) - self.limits.slots
            spent = [
                handle
                for handle in self._active.values()
                if self._batch.tokens(handle.key) - handle.slice_start >= self.limits.time_slice
            ]
            preempted = sum(handle.started for handle in self._ready)
            most = min(short, len(self._ready), _PREEMPTED * self.limits.slots - preempted)
            for handle in spent[: max(0, most)]:
                handle.slice_start = self._batch.tokens(handle.key)
                self._batch.preempt(handle.key)
                del self._active[handle.key]
                self._ready.append(handle)

    def _admit(self) -> None:
        """Fill free slots in order of arrival; new coarse passes start together, within `prefill_tokens`."""
        chosen: list[RequestHandle] = []
        tokens = 0
        with self._wake:
            while self._ready and len(self._active) < self.limits.slots:
                handle = self._ready[0]
                tokens += 0 if handle.started else handle.visual_tokens
                if any(not other.started for other in chosen) and tokens > self.limits.prefill_tokens:
                    break
                chosen.append(self._ready.popleft())
                self._active[handle.key] = handle
        if preempted := [handle.key for handle in chosen if handle.started]:
            self._batch.resume(preempted)
        new = [handle for handle in chosen if not handle.started]
        for handle in new:
            handle.started = True
        if perceptions := [handle for handle in new if handle.perceive]:
            self._start(perceptions, self._batch.perceive)
        if answers := [handle for handle in new if not handle.perceive]:
            self._start(answers, self._batch.add)

    def _start(
        self, handles: list[RequestHandle], run: Callable[[dict[int, Request], dict[int, bytes]], Iterable[KeyedEvent]]
    ) -> None:
        """Start a group; when one of them cannot run, each is started alone and only that one fails."""
        requests = {handle.key: handle.request for handle in handles}
        prefixes = {handle.key: handle.prefix for handle in handles}
        error = self._tried(lambda: run(requests, prefixes))
        if error is None:
            return
        if len(handles) == 1:
            self._end(handles[0], error)
            self._batch.abort(handles[0].key)
            return
        running = self._batch.keys
        for handle in handles:
            if not handle.ended and handle.key not in running:
                self._start([handle], run)

    def _tried(self, run: Callable[[], Iterable[KeyedEvent]]) -> QZoomError | None:
        """Deliver events; returns what went wrong. What a failed attempt held in memory is free when it returns."""
        try:
            self._deliver(run())
        except QZoomError as error:
            return error.with_traceback(None)
        except Exception:
            _log.exception("Requests failed to start.")
            return InternalError(_FAILED)
        return None

    def _deliver(self, events: Iterable[KeyedEvent]) -> None:
        for key, event in events:
            with self._wake:
                handle = self._active.get(key) or next((item for item in self._ready if item.key == key), None)
            if handle is None or (event.kind == "perception" and handle.perceived):
                continue
            handle.perceived = handle.perceived or event.kind == "perception"
            if event.error is not None:
                self._end(handle, event.error)
            elif event.kind == "answer" or handle.perceive:
                self._end(handle, event)
            elif not handle.ended:
                self._notify(handle, event)

    def _all(self) -> list[RequestHandle]:
        with self._wake:
            return [*self._active.values(), *self._ready]

    def _cancel(self, handle: RequestHandle, text: str) -> None:
        """End a request with what it has answered so far, or with an error if it has not started."""
        if handle.started:
            self._deliver(self._batch.cancel(handle.key))
        self._end(handle, StoppingError(text))

    def _run_out(self, handle: RequestHandle) -> None:
        """End a request whose time is over; an answer that is complete and was being read again is given."""
        events = list(self._batch.cancel(handle.key)) if handle.started else []
        if any(event.answer is not None and event.answer.finish_reason != "cancelled" for _, event in events):
            self._deliver(events)
            return
        text = f"The answer was not ready within {handle.deadline_s:g} s; ask for less, or try again later."
        self._end(handle, DeadlineError(text))

    def _end(self, handle: RequestHandle, last: StreamEvent | QZoomError) -> None:
        """Forget a request and send its listener the last event, once."""
        with self._wake:
            self._active.pop(handle.key, None)
            if handle in self._ready:
                self._ready.remove(handle)
            if handle.ended:
                return
            handle.ended = True
            now = time.monotonic()
            self._pace_s += 0.1 * (now - self._finished_at - self._pace_s)
            self._finished_at = now
        self._notify(handle, last)

    def _end_all(self) -> None:
        for handle in self._all():
            self._cancel(handle, "The server stopped before the answer was ready; send it to another one.")
        with self._wake:
            self._wake.notify_all()

    def _notify(self, handle: RequestHandle, event: StreamEvent | QZoomError) -> None:
        try:
            handle.listener(event)
        except Exception:
            _log.exception("A listener failed.")
