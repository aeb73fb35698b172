"""What happens around a trainer's steps: metrics, validation, the best weights; and where a stopped run goes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qzoom.errors import DataError
from qzoom.training.distill.validate import Best, Validation, Validator
from qzoom.training.stages.metrics import Metrics, StepFacts

__all__ = ["FollowSettings", "Follower", "last_checkpoint"]

_LOG = "log.jsonl"
_TOLD = ("num_tokens", "total_flos", "epoch", "loss", "grad_norm", "learning_rate")


@dataclass(frozen=True, slots=True)
class FollowSettings:
    """How a run is followed.

    Args:
        steps: optimiser steps of the whole run.
        batch: samples per step.
        every: steps between validations.
        tensorboard: also write event files.
    """

    steps: int
    batch: int
    every: int
    tensorboard: bool


class Follower(TrainerCallback):
    """Writes `metrics.jsonl` (a line a step) and `log.jsonl` (rewards and validations), and keeps the best weights.

    Args:
        folder: of this part of the run.
        settings: how.
        validator: asked every so many steps, before the first and after the last.
        best: keeps weights.
        on_step: called with each step's facts.
        on_validation: called with each validation.
    """

    def __init__(
        self,
        folder: Path,
        settings: FollowSettings,
        validator: Validator,
        best: Best,
        on_step: Callable[[StepFacts], None],
        on_validation: Callable[[Validation], None],
    ) -> None:
        self.losses: list[float] = []
        self.validations: list[Validation] = []
        self._folder, self._settings = folder, settings
        self._validator, self._best = validator, best
        self._on_step, self._on_validation = on_step, on_validation
        self._metrics: Metrics | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what a resumed run repeats; validate a fresh one before it learns."""
        if not state.is_world_process_zero:
            return
        told = self._settings
        self._metrics = Metrics(
            self._folder,
            start=state.global_step,
            steps=told.steps,
            batch=told.batch,
            tensorboard=told.tensorboard,
            on_step=self._on_step,
        )
        _keep_until(self._folder / _LOG, state.global_step)
        if state.global_step == 0:
            self._validate(0, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note a step.

        Raises:
            DataError: the loss is not finite.
        """
        if self._metrics is None or not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DataError(f"The loss of step {state.global_step} is not finite; lower the learning rate.")
        self.losses.append(loss)
        self._metrics.add(
            state.global_step, loss, float(logs.get("learning_rate", 0.0)), float(logs.get("grad_norm", 0.0))
        )
        more = {k: v for k, v in logs.items() if k not in _TOLD and isinstance(v, int | float) and math.isfinite(v)}
        if more:
            self._write({"step": state.global_step, **more})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate when it is time."""
        step = state.global_step
        if state.is_world_process_zero and (step % self._settings.every == 0 or step == self._settings.steps):
            self._validate(step, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the event files."""
        if self._metrics is not None:
            self._metrics.close()

    def _validate(self, step: int, model: Any) -> None:
        training = model.training
        model.eval()
        try:
            found = self._validator(step)
        finally:
            model.train(training)
        if found is None:
            return
        self.validations.append(found)
        self._best.note(found, lambda line: self._write({"step": step, **line}))
        self._on_validation(found)

    def _write(self, line: dict[str, Any]) -> None:
        with (self._folder / _LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; None without any."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and _complete(path / "trainer_state.json", int(number[1])):
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def _complete(state: Path, step: int) -> bool:
    """The trainer writes its state last."""
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"]) == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fine = step > 0 and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            fine = False
        if fine:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
