"""The protocol between the front end and whatever answers: look, answer, cancel, health.

The front end (routes, limits, pictures, errors, metrics, the page) sees `ServingEngine` only. Every engine has a
`QZoom`, whose tokenizer, arithmetic and limits the front end uses; its weights may be elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import ClassVar

from qzoom.engine.request import Request
from qzoom.model import QZoom
from qzoom.types import Perception, StreamEvent

Measure = tuple[str, str, float]
"""Name without prefix, meaning, value."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request on its way through an engine."""

    request: Request  # from `QZoom.request`
    tenant: str = ""  # what is cached of its pictures is shared within a tenant only
    deadline_s: float | None = None  # seconds from now until nobody waits any more; None for no limit
    streamed: bool = True  # whether somebody reads the text as it comes; else pieces behind the first may be left out


class ServingEngine(ABC):
    """What answers requests. All methods are called on one event loop."""

    grace_s: ClassVar[float] = 0.0
    """Seconds after a job's deadline in which the engine itself reports it; then the front end does."""

    refused: tuple[str, ...] = ("json_schema", "logprobs")
    """Fields of `SamplingParams` that it does not carry out; requests with them are refused."""

    def __init__(self, model: QZoom) -> None:
        self.model = model
        self._running = self._waiting = 0

    def start(self) -> None:  # noqa: B027 - most engines have nothing to do here
        """Begin to take jobs."""

    async def close(self) -> None:  # noqa: B027
        """End all jobs and free what the engine holds; may be called twice."""

    @abstractmethod
    def answer(self, job: Job) -> AsyncGenerator[StreamEvent, None]:
        """The events of an answer: one "perception", "text" pieces, one "answer".

        Closing the generator, or cancelling the task that waits for it, cancels the job and frees its slot
        (QueueFullError: too many wait already; QZoomError: what ended the job instead of an answer).
        """

    @abstractmethod
    async def look(self, job: Job) -> Perception:
        """Gate and regions, whatever the gate decides; errors and cancelling as in `answer`."""

    @abstractmethod
    async def health(self) -> str:
        """Empty while jobs are answered; else why not, in two or three words."""

    @property
    def running(self) -> int:
        """Jobs that have started and not ended."""
        return self._running

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return self._waiting

    def gauges(self) -> Iterable[Measure]:
        """Measures of its own that go up and down, for /metrics."""
        return ()

    def counters(self) -> Iterable[Measure]:
        """Measures of its own that only grow, for /metrics."""
        return ()
