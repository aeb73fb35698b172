"""Run one labelling job in several processes that fill one store, each with its share of the questions.

On GPUs every process takes a device of its own; on a CPU each takes one thread. A process that dies leaves the others
running; what it had finished is kept, and the same command goes on.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qzoom.errors import DataError, QZoomError
from qzoom.store.schema import Question

if TYPE_CHECKING:
    from qzoom.engine.state import Engine

__all__ = ["Job", "ModelChoice", "run_shares"]


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model labels, so that every process can load it.

    Args:
        name: hub id, folder or "tiny".
        revision: hub revision.
        device: "cpu", "cuda" or "cuda:1"; with "cuda" process i takes device i.
        dtype: "auto", "float32" or "bfloat16".
    """

    name: str
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"

    def load(self, number: int = 0) -> Engine:
        """The engine for process `number`."""
        import torch

        from qzoom.checkpoints.load import load_engine

        device = self.device
        if device == "cuda":
            device = f"cuda:{number % max(1, torch.cuda.device_count())}"
        return load_engine(self.name, revision=self.revision, dtype=self.dtype, device_map=device)


class Job(Protocol):
    """What a process does with its share; an instance must be picklable (a dataclass of plain values)."""

    def __call__(
        self, engine: Engine, questions: Sequence[Question], folder: Path, number: int, on_question: Callable[[], None]
    ) -> None:
        """Label `questions` into the store `folder` as writer `number`."""


def run_shares(
    job: Job,
    choice: ModelChoice,
    engine: Engine | None,
    questions: Sequence[Question],
    folder: Path,
    *,
    processes: int = 1,
    on_question: Callable[[int], None] = lambda _: None,
) -> None:
    """Do the job for all questions.

    Args:
        job: what to do.
        choice: the model, for other processes.
        engine: the model, for this process; None loads it.
        questions: all of them; those that are done cost nothing.
        folder: the store.
        processes: how many.
        on_question: called with the number of questions done since the last call.

    Raises:
        DataError: a process died, or ended with an error.
    """
    if processes == 1:
        job(engine or choice.load(), questions, folder, 0, lambda: on_question(1))
        return
    context = multiprocessing.get_context("spawn")
    done: Queue[int | str] = context.Queue()
    said: list[str] = []
    workers = [
        context.Process(target=_work, args=(job, choice, list(questions[i::processes]), folder, i, done), daemon=True)
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.join(timeout=0.2)
        _drain(done, on_question, said)
    _drain(done, on_question, said)
    if said:
        raise DataError(said[0])
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise DataError(
            f"A labelling process ended with code {failed[0]}; what was done is kept, run the command again."
        )


def _drain(done: Queue[int | str], on_question: Callable[[int], None], said: list[str]) -> None:
    """Take what the processes sent: questions done, and the sentences they ended with."""
    count = 0
    while not done.empty():
        sent = done.get()
        if isinstance(sent, str):
            said.append(sent)
        else:
            count += sent
    if count:
        on_question(count)


def _work(
    job: Job, choice: ModelChoice, questions: list[Question], folder: Path, number: int, done: Queue[int | str]
) -> None:
    import torch

    if choice.device == "cpu":
        torch.set_num_threads(1)
    try:
        job(choice.load(number), questions, folder, number, lambda: done.put(1))
    except QZoomError as error:
        done.put(str(error))
