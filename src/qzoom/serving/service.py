"""One running server: what all routes share, and the way of a request between HTTP and the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from qzoom.engine.request import Request
from qzoom.errors import DeadlineError, EngineDownError, QueueFullError, StoppingError
from qzoom.serving.convert import Converter, PreparedBody
from qzoom.serving.engines.base import Job, ServingEngine
from qzoom.serving.errors import ApiError
from qzoom.serving.memory import keep_trimmed
from qzoom.serving.metrics import ServerMetrics
from qzoom.serving.pictures import PictureCache, ReadingTime, late
from qzoom.serving.protocol import PagesRequest, PerceiveRequest, read_payload, validate
from qzoom.serving.replies import PagesReply, pages_reply
from qzoom.serving.settings import ServerSettings
from qzoom.types import Answer, SamplingParams, StreamEvent

Body = TypeVar("Body", bound=PerceiveRequest)
Checked = TypeVar("Checked", bound=PerceiveRequest | PagesRequest)
Result = TypeVar("Result")
_log = logging.getLogger("qzoom.serving")


class ResponseStream:
    """Events of one submitted request, measured on the way; a task of its own draws them from the engine.

    Args:
        arrived_s: when the request arrived, on the monotonic clock.
        deadline_s: on the same clock; an engine that is silent beyond it is given up.
    """

    def __init__(
        self, events: AsyncGenerator[StreamEvent, None], metrics: ServerMetrics, arrived_s: float, deadline_s: float
    ) -> None:
        self._events: asyncio.Queue[StreamEvent | Exception] = asyncio.Queue()
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._has_text = False
        self._task = asyncio.create_task(self._draw(events, deadline_s - time.monotonic()))

    async def _draw(self, events: AsyncGenerator[StreamEvent, None], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds), aclosing(events):
                async for event in events:
                    self._events.put_nowait(event)
            self._events.put_nowait(EngineDownError("The engine ended before the answer was complete; ask again."))
        except TimeoutError:
            self._events.put_nowait(DeadlineError("The answer did not come in the time that a request has."))
        except Exception as error:  # raised again where the events are read
            self._events.put_nowait(error)

    async def next(self) -> StreamEvent:
        """The next event (QZoomError: what ended the request instead of an answer)."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if event.answer is not None and event.answer.finish_reason == "cancelled":
            raise StoppingError("The server stopped before the answer was complete; ask again.")
        elapsed_s = time.monotonic() - self._arrived_s
        if not self._has_text and (event.kind == "text" or event.answer is not None):
            self._has_text = True
            self._metrics.first_token_s.observe(elapsed_s)
        if event.answer is not None:
            self._metrics.request_s.observe(elapsed_s)
            self._metrics.answered(event.answer)
        return event

    async def answer(self, event: StreamEvent) -> Answer:
        """The answer, from an event on."""
        while event.answer is None:
            event = await self.next()
        return event.answer

    def cancel(self) -> None:
        """End the request and free its slot; harmless once the answer has ended."""
        self._task.cancel()


class Service:
    """What the routes share."""

    def __init__(self, engine: ServingEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.pictures = PictureCache(settings.scheduler.picture_cache_bytes)
        self.metrics = ServerMetrics(engine, self.pictures)
        self.started = int(time.time())
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._trimmed: threading.Event | None = None
        self._converter = Converter(
            engine.model,
            settings.limits,
            settings.fetch,
            self.metrics.rejected,
            self.pictures,
            strict=settings.strict_max_tokens,
        )
        workers = min(4, os.cpu_count() or 1)
        self._readers = ThreadPoolExecutor(max(2, workers), thread_name_prefix="qzoom-read")
        self._fetchers = ThreadPoolExecutor(settings.limits.reading, thread_name_prefix="qzoom-fetch")

    def start(self) -> None:
        """Start the engine, and give back what requests leave behind in this process."""
        if not self.engine.model.has_region:
            _log.warning("%s has no region head: this server never zooms.", self.settings.model_name)
        self.engine.start()
        self._trimmed = keep_trimmed()

    async def ready(self) -> str:
        """Empty when requests are answered; else why not."""
        return "draining" if self.draining else await self.engine.health()

    def begin_request(self) -> None:
        """Count a request as in flight (StoppingError: the server is draining)."""
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
        await self.engine.close()
        if self._trimmed is not None:
            self._trimmed.set()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def reading(self, arrived_s: float) -> ReadingTime:
        """The time in which a request must be read. `arrived_s`: when it arrived, on the monotonic clock."""
        return ReadingTime(arrived_s + self.settings.deadline_s)

    async def read(self, kind: type[Body], raw: bytes, tenant: str, reading: ReadingTime) -> tuple[Body, Request]:
        """Check a body, decode its pictures, tokenise.

        Args:
            reading: until when; its `work` may go on for a moment when this ends early.

        Raises:
            QZoomError: anything that cannot be used, the time is over, or a full queue, before anything is decoded.
        """
        body, prepared = await self._prepared(kind, raw, reading)
        pool = self._fetchers if prepared.slow else self._readers
        return body, await _run(pool, lambda: self._converter.request(body, prepared, tenant, reading), reading)

    async def pages(self, raw: bytes, tenant: str, reading: ReadingTime) -> PagesReply:
        """Check a body with a PDF and draw its pages; arguments and errors as in `read`."""
        body, prepared = await self._prepared(PagesRequest, raw, reading)

        def draw() -> PagesReply:
            return pages_reply(body.model, self._converter.pages(body, prepared, tenant, reading))

        return await _run(self._fetchers, draw, reading)

    async def _prepared(self, kind: type[Checked], raw: bytes, reading: ReadingTime) -> tuple[Checked, PreparedBody]:
        if self.engine.waiting >= self.settings.scheduler.queue:
            raise QueueFullError("The server has more requests than it can queue; try again in a moment.", 1.0)

        def prepare() -> tuple[Checked, PreparedBody]:
            body = validate(kind, read_payload(raw, self.settings.limits))
            if body.model != self.settings.model_name:
                raise self.no_model(body.model)
            return body, self._converter.prepare(body, reading)

        return await _run(self._readers, prepare, reading)

    def submit(
        self, request: Request, tenant: str, arrived_s: float, *, perceive: bool = False, streamed: bool = True
    ) -> ResponseStream:
        """Hand a request to the engine.

        Args:
            arrived_s: when it arrived, on the monotonic clock.
            streamed: see `Job`.

        Raises:
            DeadlineError: its time is over already. Whatever else is wrong, the stream's first event raises.
        """
        if name := _refused(request, self.engine):
            raise ApiError(400, f"This server's engine does not take {name}; leave it out.", param=name)
        deadline = arrived_s + self.settings.deadline_s
        left = deadline - time.monotonic()
        if left <= 0:
            raise late()
        job = Job(request, tenant, left, streamed)
        events = self._look(job) if perceive else self.engine.answer(job)
        return ResponseStream(events, self.metrics, arrived_s, deadline + self.engine.grace_s)

    async def _look(self, job: Job) -> AsyncGenerator[StreamEvent, None]:
        yield StreamEvent("perception", perception=await self.engine.look(job))

    def no_model(self, name: str) -> ApiError:
        """The refusal for a model that is not served here."""
        own = self.settings.model_name
        text = f"There is no model {ascii(name)[:80]} here; this server has {own!r}."
        return ApiError(404, text, param="model", code="model_not_found")


def _refused(request: Request, engine: ServingEngine) -> str:
    """The field of a request that its engine does not carry out; "" for none."""
    given, default = request.options.sampling, SamplingParams()
    name = next((name for name in engine.refused if getattr(given, name) != getattr(default, name)), "")
    return "response_format" if name == "json_schema" else name


async def _run(pool: ThreadPoolExecutor, work: Callable[[], Result], reading: ReadingTime) -> Result:
    """The result of a thread's work. When the time is over or the caller is cancelled, the work is told to stop, and
    `reading.work` is done when it has (DeadlineError: the time is over)."""
    left_s = reading.left_s()
    reading.work = pool.submit(work)
    try:
        async with asyncio.timeout(left_s) as clock:
            return await asyncio.wrap_future(reading.work)
    except TimeoutError as error:
        reading.cancel()
        if clock.expired():
            raise late() from error
        raise
    except asyncio.CancelledError:
        reading.cancel()
        raise
