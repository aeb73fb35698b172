"""One worker thread that owns the model and keeps a running batch of everybody's questions.

Between two decode steps it drops who left or ran out of time, lets waiting ones join (their looks and zooms run as one
batch) and, when places are short, makes long answers take turns with waiting ones.

Memory of a process that lives long: what requests took goes back to the system.

glibc keeps freed blocks in an arena per thread. Decoded pictures of many megabytes, allocated and freed on several
threads, then let a busy server grow for minutes.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from qzoom.engine.batch import ContinuousBatch, KeyedEvent
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.engine.request import Request, check_requests, coarse_budget
from qzoom.errors import ConfigError, DeadlineError, InternalError, QueueFullError, QZoomError, StoppingError
from qzoom.model import QZoom
from qzoom.types import StreamEvent

__all__ = ["Listener", "Scheduler", "SchedulerLimits", "Ticket", "limit_arenas", "settle", "trim_memory"]


Listener = Callable[[StreamEvent | QZoomError], None]
"""Called on the worker thread; must not block."""

_PARKED = 2  # answers that may be parked, in multiples of the slots; each holds its keys and values
_TRIM_S = 5.0  # how often freed memory is given back
_IDLE_S = 0.5  # how often an idle worker shows that it lives
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much is done at once.

    Args:
        slots: answers decoded together.
        queue: requests that may wait; each holds its decoded pictures, some 12 MB for a page of three megapixels.
        prefill_tokens: visual tokens of the looks that start together; a single larger one runs alone.
        quantum: tokens that an answer may take before a waiting request gets its place.
        cache_bytes: memory of the prefix cache; 0 turns it off. A server keeps decoded pictures in a quarter of it.

    Raises:
        ConfigError: a value out of range.
    """

    slots: int = 16
    queue: int = 64
    prefill_tokens: int = 4096
    quantum: int = 64
    cache_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, least = getattr(self, name), 0 if name == "cache_bytes" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}.")


class Ticket:
    """A submitted request."""

    def __init__(self, job: _Job, wake: threading.Condition) -> None:
        self._job = job
        self._wake = wake

    def cancel(self) -> None:
        """End it before the next decode step; from any thread, any number of times."""
        with self._wake:
            self._job.cancelled = True
            self._wake.notify()


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way. `turn` is the number of tokens at which it last got a place."""

    key: int
    request: Request
    prefix: bytes
    listener: Listener
    deadline: float | None
    deadline_s: float
    perceive: bool
    visual_tokens: int
    turn: int = 0
    started: bool = False
    perceived: bool = False
    cancelled: bool = False
    ended: bool = False


class Scheduler:
    """Continuous batching over one model.

    Args:
        model: used by the worker thread only, from `start` on.
        limits: how much is done at once.
    """

    def __init__(self, model: QZoom, limits: SchedulerLimits | None = None) -> None:
        self.limits = limits or SchedulerLimits()
        self.cache = PrefixCache(self.limits.cache_bytes)
        self._model = model
        self._batch = ContinuousBatch(model.engine, cache=self.cache)
        self._keys = itertools.count()
        self._wake = threading.Condition()
        self._ready: deque[_Job] = deque()  # waiting for a place: new ones and parked ones, in turn
        self._active: dict[int, _Job] = {}  # in the batch
        self._open = True
        self._stop = False
        self._beat = time.monotonic()
        self._pace_s = 1.0  # seconds between two finished requests, smoothed
        self._finished_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="qzoom-scheduler", daemon=True)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that have begun and not ended."""
        with self._wake:
            return len(self._active) + sum(job.started for job in self._ready)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        with self._wake:
            return sum(not job.started for job in self._ready)

    @property
    def beat_age_s(self) -> float:
        """Seconds since the worker last went round its loop."""
        return time.monotonic() - self._beat

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
    ) -> Ticket:
        """Queue a request. Hashes its pictures, so call it where decoding is done, not on an event loop.

        Args:
            request: from `QZoom.request`.
            listener: gets "perception", "text" and one last "answer" event, or a `QZoomError` as the last one; with
                `perceive` one "perception" and nothing else.
            tenant: prefixes are shared within a tenant only.
            deadline_s: seconds from now until it fails with `DeadlineError`; None waits.
            perceive: gate and regions only.

        Raises:
            QueueFullError: too many wait already.
            StoppingError: nothing new is taken.
            QuestionError, BudgetError: it cannot fit into what the model reads.
        """
        engine = self._model.engine
        check_requests(engine, [request])
        budget = coarse_budget(engine, request.options)
        grids = [engine.backbone.grid(picture.size_px, budget) for picture in request.pictures]
        job = _Job(
            key=next(self._keys),
            request=request,
            prefix=prefix_key(engine, request, tenant) if self.limits.cache_bytes else b"",
            listener=listener,
            deadline=None if deadline_s is None else time.monotonic() + deadline_s,
            deadline_s=deadline_s or 0.0,
            perceive=perceive,
            visual_tokens=sum(rows * columns for rows, columns in grids),
        )
        with self._wake:
            if not self._open:
                raise StoppingError("The server is shutting down; send the request to another one or later.")
            waiting = sum(not other.started for other in self._ready)
            if waiting >= self.limits.queue:
                wait_s = max(1.0, waiting * self._pace_s)
                raise QueueFullError(f"{waiting} requests wait already; try again in {wait_s:.0f} s.", wait_s)
            self._ready.append(job)
            self._wake.notify()
        return Ticket(job, self._wake)

    def refuse_new(self) -> None:
        """From now on `submit` raises `StoppingError`; what was taken goes on."""
        with self._wake:
            self._open = False

    def close(self, drain_s: float) -> None:
        """Refuse new requests, let the taken ones finish for up to `drain_s` seconds, end the rest and the thread."""
        self.refuse_new()
        with self._wake:
            self._wake.wait_for(lambda: not self._ready and not self._active, drain_s)
            self._stop = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        trimmed = time.monotonic()
        while True:
            with self._wake:
                if not self._stop and not self._ready and not self._active:
                    self._wake.notify_all()
                    self._wake.wait(_IDLE_S)
                stop = self._stop
            self._beat = time.monotonic()
            if self._beat - trimmed > _TRIM_S:
                trim_memory()
                trimmed = self._beat
            if stop:
                self._end_all()
                return
            self._drop()
            self._take_turns()
            self._admit()
            if self._batch.keys:
                self._guarded(list(self._active.values()), lambda: self._batch.step())

    def _drop(self) -> None:
        """End those whose client left or whose time is over."""
        now = time.monotonic()
        with self._wake:
            everyone = [*self._active.values(), *self._ready]
        for job in everyone:
            late = job.deadline is not None and now > job.deadline
            if not job.cancelled and not late:
                continue
            if late and not job.cancelled:
                text = f"The answer was not ready within {job.deadline_s:g} s; ask for less, or try again later."
                self._end(job, DeadlineError(text))
            if job.started:
                self._deliver(self._batch.cancel(job.key))
            self._end(job, StoppingError("The request was cancelled before it began."))

    def _take_turns(self) -> None:
        """Where places are short, park the answers that have had their quantum, so that waiting ones get a turn."""
        with self._wake:
            short = len(self._active) + len(self._ready) - self.limits.slots
            spent = [
                job for job in self._active.values() if self._batch.tokens(job.key) - job.turn >= self.limits.quantum
            ]
            parked = sum(job.started for job in self._ready)
            for job in spent[: max(0, min(short, len(self._ready), _PARKED * self.limits.slots - parked))]:
                job.turn = self._batch.tokens(job.key)
                self._batch.park(job.key)
                del self._active[job.key]
                self._ready.append(job)

    def _admit(self) -> None:
        """Fill free places in order of arrival; the new ones' looks start together, within `prefill_tokens`."""
        chosen: list[_Job] = []
        tokens = 0
        with self._wake:
            while self._ready and len(self._active) < self.limits.slots:
                job = self._ready[0]
                tokens += 0 if job.started else job.visual_tokens
                if any(not other.started for other in chosen) and tokens > self.limits.prefill_tokens:
                    break
                chosen.append(self._ready.popleft())
                self._active[job.key] = job
        if parked := [job for job in chosen if job.started]:
            self._batch.resume([job.key for job in parked])
        new = [job for job in chosen if not job.started]
        for job in new:
            job.started = True
        if looks := [job for job in new if job.perceive]:
            self._start(looks, self._batch.perceive)
        if asked := [job for job in new if not job.perceive]:
            self._start(asked, self._batch.add)

    def _start(
        self, jobs: list[_Job], run: Callable[[dict[int, Request], dict[int, bytes]], Iterable[KeyedEvent]]
    ) -> None:
        """Start a group; when one of them cannot run, each is started alone and only that one fails."""
        requests = {job.key: job.request for job in jobs}
        prefixes = {job.key: job.prefix for job in jobs}
        if len(jobs) == 1:
            self._guarded(jobs, lambda: run(requests, prefixes))
            return
        try:
            self._deliver(run(requests, prefixes))
        except Exception as error:
            if not isinstance(error, QZoomError):
                _log.exception("A group of %d requests failed; each is tried alone.", len(jobs))
            running = self._batch.keys
            for job in jobs:
                if not job.ended and job.key not in running:
                    self._start([job], run)

    def _guarded(self, jobs: list[_Job], run: Callable[[], Iterable[KeyedEvent]]) -> None:
        """Deliver what a step gives; an unforeseen error ends its requests with a fixed text and goes to the log."""
        try:
            self._deliver(run())
        except QZoomError as error:
            for job in jobs:
                self._fail(job, error)
        except Exception:
            _log.exception("A step of %d requests failed.", len(jobs))
            for job in jobs:
                self._fail(job, InternalError("The server failed while it answered; its log says more."))

    def _fail(self, job: _Job, error: QZoomError) -> None:
        self._end(job, error)
        self._batch.forget(job.key)

    def _deliver(self, named: Iterable[KeyedEvent]) -> None:
        for key, event in named:
            job = self._active.get(key) or next((job for job in self._ready if job.key == key), None)
            if job is None or (event.kind == "perception" and job.perceived):
                continue
            job.perceived = job.perceived or event.kind == "perception"
            if event.kind == "answer" or job.perceive:
                self._end(job, event)
            elif not job.ended:
                self._tell(job, event)

    def _end(self, job: _Job, last: StreamEvent | QZoomError) -> None:
        """Forget a request and tell its listener the end, once."""
        with self._wake:
            self._active.pop(job.key, None)
            if job in self._ready:
                self._ready.remove(job)
            if job.ended:
                return
            job.ended = True
            now = time.monotonic()
            self._pace_s += 0.1 * (now - self._finished_at - self._pace_s)
            self._finished_at = now
        self._tell(job, last)

    def _end_all(self) -> None:
        with self._wake:
            left = [*self._active.values(), *self._ready]
        for job in left:
            if job.started:
                self._deliver(self._batch.cancel(job.key))
            self._end(job, StoppingError("The server stopped before the answer was ready; send it to another one."))
        with self._wake:
            self._wake.notify_all()

    def _tell(self, job: _Job, event: StreamEvent | QZoomError) -> None:
        try:
            job.listener(event)
        except Exception:
            _log.exception("A listener failed.")


_ARENA_MAX = -8  # of malloc.h


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    try:
        found = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return found if hasattr(found, "malloc_trim") and hasattr(found, "mallopt") else None


def limit_arenas(count: int = 2) -> bool:
    """Let all threads share a few arenas; call it before threads start.

    Returns:
        Whether the C library took it; other libraries than glibc are left as they are.
    """
    libc = _libc()
    return libc is not None and libc.mallopt(_ARENA_MAX, count) == 1


def settle() -> None:
    """Leave what has been loaded out of later collections, so that those are quick; call it once, before serving."""
    gc.collect()
    gc.freeze()


def trim_memory() -> None:
    """Collect finished requests, whose errors and tasks refer to each other and so keep their pictures, and (glibc)
    give free pages back to the system; takes a few milliseconds after `settle`."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
