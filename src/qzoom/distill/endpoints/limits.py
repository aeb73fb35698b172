"""How many requests an endpoint gets at once and per minute, counted over all processes of the machine."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from qzoom.distill.endpoints.cache import CallCache
from qzoom.distill.endpoints.settings import EndpointSettings

__all__ = ["Limits"]

_POLL_S = 0.02


class Limits:
    """Hands out turns at endpoints.

    Args:
        cache: beside whose file the places lie.
    """

    def __init__(self, cache: CallCache) -> None:
        self._cache = cache
        self._gates: dict[tuple[str, int], threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()

    @contextmanager
    def place(self, endpoint: EndpointSettings) -> Iterator[None]:
        """Wait for one of the endpoint's places, then for its next turn, and hold the place."""
        with self._lock:
            key = (endpoint.url, endpoint.concurrency)
            gate = self._gates.setdefault(key, threading.BoundedSemaphore(endpoint.concurrency))
        with gate, self._file_place(endpoint):
            if endpoint.requests_per_minute:
                time.sleep(self._cache.turn(endpoint.url, 60.0 / endpoint.requests_per_minute))
            yield

    @contextmanager
    def _file_place(self, endpoint: EndpointSettings) -> Iterator[None]:
        """One of as many lock files as there are places; a killed process gives its places back."""
        from filelock import FileLock, Timeout

        folder = self._cache.locks()
        name = hashlib.sha256(endpoint.url.encode()).hexdigest()[:12]
        while True:
            for number in range(endpoint.concurrency):
                lock = FileLock(folder / f"place-{name}-{number}.lock", thread_local=False)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            time.sleep(_POLL_S)
