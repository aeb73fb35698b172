"""Milliseconds per step of one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up wall time by step name; on CUDA it waits for the device before reading the clock.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._started = self._now()
        self._ms: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block under a name; repeated names add up."""
        begin = self._now()
        try:
            yield
        finally:
            self._ms[name] = self._ms.get(name, 0.0) + (self._now() - begin) * 1000

    def snapshot(self) -> dict[str, float]:
        """Steps so far in order, then "total" since the start."""
        return {**self._ms, "total": (self._now() - self._started) * 1000}

    def _now(self) -> float:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()
