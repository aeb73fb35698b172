"""Validation of the student and what else happens around a trainer's steps: metrics, best weights, resuming.

The student answers questions about held-out images greedily through the engine, exactly as it does for a user. Those
whose target is absent are counted apart: a student that only learns to say yes gets worse on them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.model import QZoom
from qzoom.training.run import MetricsLog, TrainingRun, copy_weights, read_tensors, save_tensors, truncate_log
from qzoom.training.student.collate import Prompter
from qzoom.training.student.data import ExportedQuestion
from qzoom.training.student.recipe import StudentRecipe
from qzoom.training.student.rewards import accuracy

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Validation:
    """Figures of a validation."""

    step: int  # optimiser steps done
    n: int  # questions
    exact: float  # share answered rightly
    n_negative: int  # questions whose target is absent
    exact_negative: float | None  # share of those; None without any
    exact_positive: float | None  # share of the others; None without any


def some_of(questions: Sequence[ExportedQuestion], most: int) -> tuple[ExportedQuestion, ...]:
    """At most so many questions, chosen by a hash of their ids: the same ones whatever their order."""
    ranked = sorted(questions, key=lambda q: (hashlib.sha256(q.id.encode()).hexdigest(), q.text))
    return tuple(ranked[:most])


def validate_student(
    engine: Engine, questions: Sequence[ExportedQuestion], recipe: StudentRecipe, step: int
) -> Validation | None:
    """Ask the student, as it is after so many steps, the questions; None without any."""
    if not questions:
        return None
    right = _answered_rightly(engine, questions, recipe)
    negative = [ok for ok, q in zip(right, questions, strict=True) if q.negative]
    positive = [ok for ok, q in zip(right, questions, strict=True) if not q.negative]
    return Validation(step, len(right), _mean(right) or 0.0, len(negative), _mean(negative), _mean(positive))


def _answered_rightly(engine: Engine, questions: Sequence[ExportedQuestion], recipe: StudentRecipe) -> list[bool]:
    """Whether each question is answered rightly, by rules alone."""
    model, prompter = QZoom(engine, "the student"), Prompter(engine, recipe)
    options: dict[str, Any] = {"zoom": "never", "max_new_tokens": recipe.max_new_tokens}
    if recipe.validation_tokens:
        options["coarse_tokens"] = recipe.validation_tokens
    order = sorted(range(len(questions)), key=lambda i: questions[i].picture)
    right: dict[int, bool] = {}
    with torch.no_grad():
        for begin in range(0, len(order), _AT_ONCE):
            some = order[begin : begin + _AT_ONCE]
            samples = [(questions[i].picture, prompter.wording(questions[i], "none")) for i in some]
            for i, answer in zip(some, model.ask_batch(samples, **options), strict=True):
                form, longest = recipe.answer_form, recipe.longest_plain
                reward = accuracy(answer.text, questions[i], form=form, longest_plain=longest)
                right[i] = reward.accuracy == 1.0
    return [right[i] for i in range(len(questions))]


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


_LOG = "log.jsonl"
_IN_METRICS = ("num_tokens", "total_flos", "epoch", "loss", "grad_norm", "learning_rate")


class StudentCallback(TrainerCallback):
    """Writes `metrics.jsonl` (a line per step) and `log.jsonl` (rewards and validations), and saves the best weights.

    Validates before the first step, every `validation_steps` and after the last of the phase's steps.

    Args:
        run: the phase's folder and the callbacks.
        phase: "sft" or "grpo".
    """

    def __init__(
        self,
        run: TrainingRun[StudentRecipe],
        phase: str,
        steps: int,
        questions: Sequence[ExportedQuestion],
        weights: dict[str, nn.Parameter],
    ) -> None:
        self.validations: list[Validation] = []
        self.start = 0
        self._run, self._phase, self._steps, self._weights = run, phase, steps, weights
        self._questions = some_of(questions, run.recipe.validation_items)
        self._metrics: MetricsLog | None = None
        self._best_file = run.folder / f"best-{phase}.safetensors"
        self._best: dict[str, Any] | None = None
        if self._best_file.is_file():
            self._best = json.loads(read_tensors(self._best_file, only_metadata=True)[1]["validation"])

    def restore_best(self) -> int | None:
        """Put the saved weights back; the step they are of, or None without any."""
        if self._best is None:
            return None
        copy_weights(self._weights, read_tensors(self._best_file)[0])
        return int(self._best["step"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what a resumed run repeats; validate a fresh one before it learns."""
        self.start = state.global_step
        if not state.is_world_process_zero:
            return
        batch = getattr(self._run.recipe, self._phase).batch
        self._metrics = MetricsLog(self._run, start=self.start, steps=self._steps, batch=batch)
        truncate_log(self._run.folder / _LOG, self.start)
        if self.start == 0:
            self._validate(0, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log a step (DataError: the loss is not finite)."""
        if self._metrics is None or not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise DataError(f"The loss of step {state.global_step} is not finite; lower the learning rate.")
        self._metrics.add(
            state.global_step, loss, float(logs.get("learning_rate", 0.0)), float(logs.get("grad_norm", 0.0))
        )
        more = {
            k: v for k, v in logs.items() if k not in _IN_METRICS and isinstance(v, int | float) and math.isfinite(v)
        }
        if more:
            self._write({"step": state.global_step, **more})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate when it is time."""
        step = state.global_step
        if state.is_world_process_zero and (step % self._run.recipe.validation_steps == 0 or step == self._steps):
            self._validate(step, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the event files."""
        if self._metrics is not None:
            self._metrics.close()

    def _validate(self, step: int, model: Any) -> None:
        training = model.training
        model.eval()
        try:
            validation = validate_student(self._run.engine, self._questions, self._run.recipe, step)
        finally:
            model.train(training)
        if validation is None:
            return
        self.validations.append(validation)
        self._write({"step": step, "phase": self._phase, "validation": asdict(validation)})
        better = self._best is None or validation.exact >= self._best["exact"]
        if better or self._run.recipe.keep == "last":
            self._best = asdict(validation)
            save_tensors(self._best_file, self._weights, {"validation": json.dumps(self._best)})
        self._run.on_validation(validation)

    def _write(self, line: dict[str, Any]) -> None:
        with (self._run.folder / _LOG).open("a", encoding="utf-8") as file:
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
