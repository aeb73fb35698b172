"""Answers for asynchronous programs: one thread runs the model, and events come back to the caller's event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from qzoom.types import StreamEvent

Events = Callable[[Callable[[], bool]], Iterator[StreamEvent]]
"""Makes the events of one question; what it is given says whether nobody waits for them any more."""


class Worker:
    """One thread, which questions of any number of event loops share in the order in which they come."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="qzoom-worker")

    async def events(self, make: Events) -> AsyncGenerator[StreamEvent, None]:
        """Run one question and yield its events (QZoomError: whatever `make` or its iterator raises)."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[StreamEvent | BaseException | None] = asyncio.Queue()
        left = threading.Event()

        def put(item: StreamEvent | BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the event loop is closed
                left.set()

        def work() -> None:
            try:
                for event in make(left.is_set):
                    put(event)
                    if left.is_set():
                        break
                put(None)
            except BaseException as error:  # raised again where the events are awaited
                put(error)

        job = self._pool.submit(work)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            job.cancel()
