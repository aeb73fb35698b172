"""The native engine: the scheduler's continuous batch, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import ClassVar

from qzoom.errors import QZoomError
from qzoom.model import QZoom
from qzoom.serving.engines.base import Job, Measure, ServingEngine
from qzoom.serving.scheduler import RequestHandle, Scheduler
from qzoom.serving.settings import ServerSettings
from qzoom.types import Perception, StreamEvent


class NativeEngine(ServingEngine):
    """Answers by the model in this process."""

    grace_s: ClassVar[float] = 5.0
    refused: tuple[str, ...] = ()

    def __init__(self, model: QZoom, settings: ServerSettings) -> None:
        super().__init__(model)
        limits = settings.scheduler
        self.scheduler = Scheduler(model, replace(limits, cache_bytes=limits.cache_bytes - limits.picture_cache_bytes))
        self._heartbeat_s = settings.heartbeat_s
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="qzoom-submit")

    def start(self) -> None:
        """Start the worker."""
        self.scheduler.start()

    async def close(self) -> None:
        """Cancel what still runs, and end the threads."""
        await asyncio.get_running_loop().run_in_executor(None, self.scheduler.close, 0.0)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def health(self) -> str:
        """See `ServingEngine.health`."""
        if not self.scheduler.alive:
            return "worker ended"
        return "worker silent" if self.scheduler.heartbeat_age_s > self._heartbeat_s else ""

    @property
    def running(self) -> int:
        """See `ServingEngine.running`."""
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        """See `ServingEngine.waiting`."""
        return self.scheduler.waiting

    def answer(self, job: Job) -> AsyncGenerator[StreamEvent, None]:
        """See `ServingEngine.answer`."""
        return self._events(job, perceive=False)

    async def look(self, job: Job) -> Perception:
        """See `ServingEngine.look`."""
        async with aclosing(self._events(job, perceive=True)) as events:
            perception = (await anext(events)).perception
        if perception is None:
            raise RuntimeError("the worker's first event was not a perception")
        return perception

    async def _events(self, job: Job, *, perceive: bool) -> AsyncGenerator[StreamEvent, None]:
        """The worker's events, brought from its thread to the event loop."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[StreamEvent | QZoomError] = asyncio.Queue()

        def listen(event: StreamEvent | QZoomError) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it everyone who could read this
                loop.call_soon_threadsafe(queue.put_nowait, event)

        def submit() -> RequestHandle:  # on a thread, since it hashes the pictures
            return self.scheduler.submit(
                job.request, listen, tenant=job.tenant, deadline_s=job.deadline_s, perceive=perceive
            )

        submitted = loop.run_in_executor(self._threads, submit)
        try:
            await asyncio.shield(submitted)
            while True:
                event = await queue.get()
                if isinstance(event, QZoomError):
                    raise event
                yield event
                if event.answer is not None or perceive:
                    return
        finally:
            submitted.add_done_callback(_cancel)

    def gauges(self) -> Iterable[Measure]:
        """The worker's pulse and the prefix cache."""
        cache = self.scheduler.cache
        return (
            ("worker_beat_age_seconds", "Since the worker's last step.", self.scheduler.heartbeat_age_s),
            ("prefix_cache_bytes", "Memory of the prefix cache.", cache.nbytes + cache.regions.nbytes),
            ("prefix_cache_entries", "Prefixes kept.", cache.entries),
        )

    def counters(self) -> Iterable[Measure]:
        """Hits of the prefix cache."""
        cache = self.scheduler.cache
        return (
            ("prefix_cache_hits", "Prompts that began with a kept prefix.", cache.hits),
            ("prefix_cache_misses", "Prompts that did not.", cache.misses),
            ("region_cache_hits", "Regions kept encoded.", cache.regions.hits),
            ("region_cache_misses", "Regions that were not.", cache.regions.misses),
        )


def _cancel(submitted: asyncio.Future[RequestHandle]) -> None:
    """Free the slot of a request that was taken; harmless once it has ended."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
