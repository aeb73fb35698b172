"""What a run tells while it goes: a line of JSON per step, TensorBoard's event files, and a bar with the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Metrics", "StepFacts"]

NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One optimiser step.

    Args:
        step: from 1.
        steps: of the whole run.
        loss: mean over the targets of the batch.
        learning_rate: of this step.
        gradient_norm: before clipping.
        samples_per_s: since this process started.
        left_s: seconds until the end at that rate.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    left_s: float


class Metrics:
    """Writes the facts of every step; lines of steps that a resumed run repeats are dropped first.

    Args:
        folder: of the run.
        start: steps done already.
        steps: of the whole run.
        batch: samples per step.
        tensorboard: also write event files, if tensorboard is installed.
        on_step: called with each step's facts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        steps: int,
        batch: int,
        tensorboard: bool,
        on_step: Callable[[StepFacts], None],
    ) -> None:
        self._path = folder / NAME
        self._start, self._steps, self._batch = start, steps, batch
        self._on_step = on_step
        self._began = time.monotonic()
        self._keep_until(start)
        self._board = _board(folder / "tensorboard", start) if tensorboard else None

    def add(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Note a step (from 1)."""
        done = step - self._start
        rate = done * self._batch / max(time.monotonic() - self._began, 1e-9)
        left = (self._steps - step) * self._batch / rate
        facts = StepFacts(step, self._steps, loss, learning_rate, gradient_norm, rate, left)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(facts)) + "\n")
        if self._board is not None:
            for name in ("loss", "learning_rate", "gradient_norm", "samples_per_s"):
                self._board.add_scalar(name, getattr(facts, name), step)
        self._on_step(facts)

    def close(self) -> None:
        """Finish the event files."""
        if self._board is not None:
            self._board.close()

    def _keep_until(self, step: int) -> None:
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    fine = json.loads(line)["step"] <= step
                except (ValueError, KeyError, TypeError):
                    fine = False
                if fine:
                    kept.append(line + "\n")
        self._path.write_text("".join(kept), encoding="utf-8")


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)
