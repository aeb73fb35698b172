"""One running server: the model behind its scheduler, and the way of a request between HTTP and the worker."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from qzoom.engine.request import Request
from qzoom.errors import DeadlineError, QueueFullError, QZoomError, StoppingError
from qzoom.model import QZoom
from qzoom.serving.convert import Converter, PictureCache
from qzoom.serving.errors import ApiError
from qzoom.serving.metrics import ServerMetrics
from qzoom.serving.protocol import PerceiveRequest, read_payload, validate
from qzoom.serving.scheduler import RequestHandle, Scheduler
from qzoom.serving.settings import ServerSettings
from qzoom.types import Answer, StreamEvent

Body = TypeVar("Body", bound=PerceiveRequest)
Result = TypeVar("Result")
_GRACE_S = 5.0
_PICTURE_SHARE = 0.25  # of the memory for caches; the rest is for prefixes
_log = logging.getLogger("qzoom.serving")


class ResponseStream:
    """Events of one submitted request, brought from the worker's thread to the event loop and measured on the way.

    Args:
        metrics: get its times and its result.
        arrived_s: when the request arrived, on the monotonic clock.
        deadline_s: on the same clock; a worker that is silent beyond it is given up.
    """

    def __init__(self, metrics: ServerMetrics, arrived_s: float, deadline_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StreamEvent | QZoomError] = asyncio.Queue()
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._deadline_s = deadline_s
        self._has_text = False
        self._handle: RequestHandle | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def attach(self, handle: RequestHandle) -> None:
        """Keep the handle, or cancel it at once when nobody waits any more; from any thread."""
        with self._lock:
            self._handle, cancelled = handle, self._cancelled
        if cancelled:
            handle.cancel()

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
        self._measure(event)
        return event

    async def answer(self, event: StreamEvent) -> Answer:
        """The answer, from an event on."""
        while event.answer is None:
            event = await self.next()
        return event.answer

    def cancel(self) -> None:
        """Free the slot, now or as soon as there is one; harmless once the answer has ended."""
        with self._lock:
            self._cancelled, handle = True, self._handle
        if handle is not None:
            handle.cancel()

    def _measure(self, event: StreamEvent) -> None:
        elapsed_s = time.monotonic() - self._arrived_s
        if not self._has_text and (event.kind == "text" or event.answer is not None):
            self._has_text = True
            self._metrics.first_token_s.observe(elapsed_s)
        if event.answer is not None:
            self._metrics.request_s.observe(elapsed_s)
            self._metrics.answered(event.answer)


class Service:
    """What the routes share.

    Args:
        model: the model.
        settings: of this server.
    """

    def __init__(self, model: QZoom, settings: ServerSettings) -> None:
        self.model = model
        self.settings = settings
        memory = settings.scheduler.cache_bytes
        self.pictures = PictureCache(int(memory * _PICTURE_SHARE))
        self.scheduler = Scheduler(model, replace(settings.scheduler, cache_bytes=memory - self.pictures.max_bytes))
        self.metrics = ServerMetrics(self.scheduler, self.pictures)
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
        if not self.model.has_region:
            _log.warning("%s has no region head: this server never zooms.", self.settings.model_name)
        self.scheduler.start()

    def ready(self) -> str:
        """Empty when requests are answered; else why not."""
        if self.draining:
            return "draining"
        if not self.scheduler.alive:
            return "worker ended"
        if self.scheduler.heartbeat_age_s > self.settings.heartbeat_s:
            return "worker silent"
        return ""

    def begin_request(self) -> None:
        """Count a request as in flight.

        Raises:
            StoppingError: the server is draining.
        """
        if self.draining:
            raise StoppingError("The server is stopping and takes no new requests; try another one.")
        self.in_flight += 1
        self._idle.clear()

    def end_request(self, status: int) -> None:
        """The end of a request that was in flight, with its HTTP status."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()
        self.metrics.ended(status)

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those in flight; returns whether all have ended."""
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

    async def read(self, kind: type[Body], raw: bytes, tenant: str) -> tuple[Body, Request]:
        """Check a body, decode its pictures, tokenise.

        Args:
            kind: what the body should be.
            raw: its bytes.
            tenant: decoded pictures are shared within a tenant only.

        Returns:
            The body, and the same for the engine.

        Raises:
            QZoomError: anything that cannot be used, or a full queue, before anything is decoded.
        """
        if self.scheduler.waiting >= self.settings.scheduler.queue:
            raise QueueFullError("The server has more requests than it can queue; try again in a moment.", 1.0)
        body = await _run(self._readers, lambda: validate(kind, read_payload(raw, self.settings.limits)))
        if body.model != self.settings.model_name:
            raise self.no_model(body.model)
        pool = self._fetchers if self._converter.must_fetch(body) else self._readers
        return body, await _run(pool, lambda: self._converter.request(body, tenant))

    async def submit(
        self, request: Request, tenant: str, arrived_s: float, *, perceive: bool = False
    ) -> ResponseStream:
        """Hand a request to the worker.

        Args:
            request: from `read`.
            tenant: prefixes are shared within a tenant only.
            arrived_s: when it arrived, on the monotonic clock.
            perceive: gate and regions only.

        Raises:
            QueueFullError, StoppingError: it cannot be taken now.
            QuestionError, BudgetError: it cannot fit into what the model reads.
        """
        deadline = arrived_s + self.settings.deadline_s
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("Reading the request took all the time that a request has.")
        stream = ResponseStream(self.metrics, arrived_s, deadline)

        def hand_over() -> None:  # on a reader's thread, since it hashes the pictures
            stream.attach(
                self.scheduler.submit(request, stream.listen, tenant=tenant, deadline_s=left, perceive=perceive)
            )

        try:
            await _run(self._readers, hand_over)
        except BaseException:
            stream.cancel()
            raise
        return stream

    def no_model(self, name: str) -> ApiError:
        """The refusal for a model that is not served here."""
        own = self.settings.model_name
        text = f"There is no model {ascii(name)[:80]} here; this server has {own!r}."
        return ApiError(404, text, param="model", code="model_not_found")


async def _run(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
