"""One running server: the model, its scheduler, and the way of one request between HTTP and the worker's thread.

How one server behaves: its name, keys, limits and times.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from starlette.types import Scope

from qzoom.engine.request import Request
from qzoom.errors import ConfigError, DeadlineError, QueueFullError, QZoomError, StoppingError
from qzoom.images.fetch import FetchPolicy
from qzoom.model import QZoom
from qzoom.serving.convert import Converter, PictureCache
from qzoom.serving.errors import ApiError
from qzoom.serving.limits import ServerLimits, read_payload
from qzoom.serving.metrics import Metrics
from qzoom.serving.middleware import TENANT, check_keys, decoded
from qzoom.serving.protocol import ChatRequest, PerceiveRequest, validate
from qzoom.serving.scheduler import Scheduler, SchedulerLimits, Ticket
from qzoom.types import Perception, StreamEvent

__all__ = ["Job", "Running", "ServerSettings", "Service"]


Asked = TypeVar("Asked", ChatRequest, PerceiveRequest)
Result = TypeVar("Result")
_GRACE_S = 5.0
_PICTURE_SHARE = 0.25  # of the memory for caches; the rest is for prefixes


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was read.

    Args:
        request: for the scheduler.
        asked: what the client sent.
        arrived_s: when, on the monotonic clock.
    """

    request: Request
    asked: ChatRequest | PerceiveRequest
    arrived_s: float


class Running:
    """Events of one submitted request, brought from the worker's thread to the event loop.

    Args:
        deadline_s: on the monotonic clock; a worker that is silent beyond it is given up.
    """

    def __init__(self, deadline_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StreamEvent | QZoomError] = asyncio.Queue()
        self._deadline_s = deadline_s
        self._ticket: Ticket | None = None
        self._left = False
        self._lock = threading.Lock()

    def hold(self, ticket: Ticket) -> None:
        """Keep the ticket, or give it back at once when nobody waits any more; from any thread."""
        with self._lock:
            self._ticket, left = ticket, self._left
        if left:
            ticket.cancel()

    def listen(self, event: StreamEvent | QZoomError) -> None:
        """Take an event; called on the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it everyone who could read this
            self.cancel()

    async def next(self) -> StreamEvent:
        """The next event.

        Raises:
            QZoomError: what ended the request instead of an answer.
        """
        left = self._deadline_s + _GRACE_S - time.monotonic()
        try:
            event = await asyncio.wait_for(self._events.get(), max(0.0, left))
        except TimeoutError as error:
            raise DeadlineError("The answer did not come in the time that a request has.") from error
        if isinstance(event, QZoomError):
            raise event
        if event.answer is not None and event.answer.finish_reason == "cancelled":
            raise StoppingError("The server stopped before the answer was complete; ask again.")
        return event

    def cancel(self) -> None:
        """Free the slot, now or as soon as there is one; harmless once the answer has ended."""
        with self._lock:
            self._left, ticket = True, self._ticket
        if ticket is not None:
            ticket.cancel()


class Service:
    """What the routes share.

    Args:
        model: the model.
        settings: of this server.
        scheduler: started by `start`.
    """

    def __init__(self, model: QZoom, settings: ServerSettings, scheduler: Scheduler | None = None) -> None:
        self.model = model
        self.settings = settings
        memory = settings.scheduler.cache_bytes
        self.pictures = PictureCache(int(memory * _PICTURE_SHARE))
        limits = replace(settings.scheduler, cache_bytes=memory - self.pictures.max_bytes)
        self.scheduler = scheduler or Scheduler(model, limits)
        self.metrics = Metrics(self.scheduler, self.pictures)
        self.started = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._converter = Converter(model, settings.limits, settings.fetch, self.metrics.rejected, self.pictures)
        workers = min(4, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(max(2, workers), thread_name_prefix="qzoom-read")
        self._fetchers = ThreadPoolExecutor(settings.limits.reading, thread_name_prefix="qzoom-fetch")

    def start(self) -> None:
        """Start the worker."""
        self.scheduler.start()

    def ready(self) -> str:
        """Empty when requests are answered; else why not."""
        if self.draining:
            return "draining"
        if not self.scheduler.alive:
            return "worker ended"
        if self.scheduler.beat_age_s > self.settings.beat_s:
            return "worker silent"
        return ""

    def enter(self) -> None:
        """Admit a request.

        Raises:
            StoppingError: the server is stopping.
        """
        if self.draining:
            raise StoppingError("The server is stopping and takes no new requests; try another one.")
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """The end of an admitted request."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those admitted; returns whether all have ended."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Cancel what still runs, and end all threads."""
        self.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self.scheduler.close, 0.0)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def read(self, kind: type[Asked], body: bytes, scope: Scope, arrived_s: float) -> Job:
        """Check a body, decode its pictures, tokenise.

        Raises:
            QZoomError: anything that cannot be used, or a full queue, before anything is decoded.
        """
        self._check_queue()
        try:
            asked = await _run(self._readers, lambda: self._parse(kind, body))
            if asked.model != self.settings.model_name:
                raise self.no_model(asked.model)
            pool = self._fetchers if self._converter.must_fetch(asked) else self._readers
            request = await _run(pool, lambda: self._converter.request(asked, scope[TENANT]))
        finally:
            decoded(scope)
        return Job(request, asked, arrived_s)

    async def submit(self, job: Job, tenant: str, *, perceive: bool = False) -> Running:
        """Hand a job to the worker; on a reader's thread, since that hashes the pictures.

        Raises:
            QueueFullError, StoppingError: it cannot be taken now.
            QuestionError, BudgetError: it cannot fit into what the model reads.
        """
        deadline = job.arrived_s + self.settings.deadline_s
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("Reading the request took all the time that a request has.")
        running = Running(deadline)

        def hand_over() -> None:
            running.hold(
                self.scheduler.submit(job.request, running.listen, tenant=tenant, deadline_s=left, perceive=perceive)
            )

        try:
            await _run(self._readers, hand_over)
        except BaseException:
            running.cancel()
            raise
        return running

    async def perception(self, job: Job, tenant: str) -> Perception:
        """Gate and regions only."""
        running = await self.submit(job, tenant, perceive=True)
        try:
            seen = (await running.next()).perception
        finally:
            running.cancel()
        if seen is None:
            raise RuntimeError("the worker's first event was not a perception")
        self.metrics.perceived(seen)
        return seen

    def no_model(self, name: str) -> ApiError:
        """The refusal for a model that is not served here."""
        own = self.settings.model_name
        text = f"There is no model {ascii(name)[:80]} here; this server has {own!r}."
        return ApiError(404, text, param="model", code="model_not_found")

    def _check_queue(self) -> None:
        """Turn away what would be refused anyway, before its pictures are decoded."""
        if self.scheduler.waiting >= self.settings.scheduler.queue:
            raise QueueFullError("The server has more requests than it can queue; try again in a moment.", 1.0)

    def _parse(self, kind: type[Asked], body: bytes) -> Asked:
        return validate(kind, read_payload(body, self.settings.limits))


async def _run(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of one server.

    Args:
        model_name: what clients call the model.
        api_keys: any of them opens the server; none leaves it open to all.
        limits: what one request may cost.
        scheduler: how many run and wait.
        fetch: which hosts pictures may be fetched from; none by default.
        deadline_s: seconds that one request may take from its first byte to its last.
        drain_s: seconds that running requests get to finish when the server stops.
        beat_s: seconds without a sign of life of the worker after which /ready says no.

    Raises:
        ConfigError: a name or key that cannot be used, or a time that is not above 0.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    deadline_s: float = 120.0
    drain_s: float = 30.0
    beat_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.model_name.strip() or not self.model_name.isprintable():
            raise ConfigError("The served model name must be a printable text that is not empty.")
        check_keys(self.api_keys)
        for name in ("deadline_s", "drain_s", "beat_s"):
            value = getattr(self, name)
            least_ok = value >= 0 if name == "drain_s" else value > 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not least_ok or value > 86_400:
                raise ConfigError(f"{name} must be seconds above 0, at most a day, not {value!r}.")
