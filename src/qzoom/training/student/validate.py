"""How good the student is on its own held-out pictures: exact match on the plain full view, nothing marked.

It is asked exactly as a user would, by the engine, greedily. Questions whose target is absent are counted apart: a
student that only learns to say yes gets worse on them while the total rises.

What happens around a trainer's steps: metrics, validation, the best weights; and where a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.training.loop import Metrics, StepFacts
from qzoom.training.student.collate import Prompter
from qzoom.training.student.data import Question
from qzoom.training.student.recipe import DistillRecipe
from qzoom.training.student.rewards import Target, accuracy

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Best", "FollowSettings", "Follower", "Validation", "Validator", "last_checkpoint", "some_of"]


_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Validation:
    """What a validation found.

    Args:
        step: optimiser steps done.
        n: questions.
        exact: share answered rightly.
        n_negative: questions whose target is absent.
        exact_negative: share of those; None without any.
        exact_positive: share of the others; None without any.
    """

    step: int
    n: int
    exact: float
    n_negative: int
    exact_negative: float | None
    exact_positive: float | None


def some_of(questions: Sequence[Question], most: int) -> tuple[Question, ...]:
    """At most so many questions, chosen by a hash of their ids: the same ones whatever their order."""
    ranked = sorted(questions, key=lambda q: (hashlib.sha256(q.id.encode()).hexdigest(), q.text))
    return tuple(ranked[:most])


class Validator:
    """Asks an engine the validation's questions.

    Args:
        engine: the student; asked as it is at the time.
        questions: to ask.
        recipe: view, form of the answer and longest answer.
    """

    def __init__(self, engine: Engine, questions: Sequence[Question], recipe: DistillRecipe) -> None:
        self.questions = some_of(questions, recipe.validation_items)
        self._engine = engine
        self._recipe = recipe
        self._prompter = Prompter(engine, recipe)

    def __call__(self, step: int) -> Validation | None:
        """Ask all of them; None when there are none."""
        if not self.questions:
            return None
        right = self.right()
        negative = [ok for ok, q in zip(right, self.questions, strict=True) if q.negative]
        positive = [ok for ok, q in zip(right, self.questions, strict=True) if not q.negative]
        return Validation(step, len(right), _mean(right) or 0.0, len(negative), _mean(negative), _mean(positive))

    def right(self) -> list[bool]:
        """Whether each question is answered rightly, by rules alone."""
        import torch

        from qzoom.model import QZoom

        model = QZoom(self._engine, "the student")
        recipe = self._recipe
        options: dict[str, Any] = {"zoom": "never", "max_new_tokens": recipe.max_new_tokens}
        if recipe.validation_tokens:
            options["coarse_tokens"] = recipe.validation_tokens
        order = sorted(range(len(self.questions)), key=lambda i: self.questions[i].picture)
        marks: dict[int, bool] = {}
        with torch.no_grad():
            for begin in range(0, len(order), _AT_ONCE):
                part = order[begin : begin + _AT_ONCE]
                asked = [self.questions[i] for i in part]
                samples = [(q.picture, self._prompter.wording(q, "none")) for q in asked]
                for i, q, answer in zip(part, asked, model.ask_batch(samples, **options), strict=True):
                    target = Target(q.text, q.answer, q.choices, q.letter, q.kind)
                    made = accuracy(answer.text, target, form=recipe.answer_form, longest_plain=recipe.longest_plain)
                    marks[i] = made.accuracy == 1.0
        return [marks[i] for i in range(len(self.questions))]


class Best:
    """Keeps the weights of the best validation, and a line of JSON for every validation.

    Args:
        folder: of the run.
        weights: those that train, by name.
        part: "sft" or "grpo", for the lines and the file.
        last: keep those of the last validation, however it went.
    """

    def __init__(self, folder: Path, weights: dict[str, nn.Parameter], part: str, *, last: bool = False) -> None:
        self._folder, self._weights, self._part, self._last = folder, weights, part, last
        self._kept: tuple[float, int] | None = self._read()

    @property
    def path(self) -> Path:
        """Where the weights are."""
        return self._folder / f"best-{self._part}.safetensors"

    def note(self, found: Validation, write: Callable[[dict[str, Any]], None]) -> bool:
        """Write a validation down; keeps the weights and says True unless an earlier one was better and counts."""
        write({"part": self._part, "validation": asdict(found)})
        if not self._last and self._kept is not None and found.exact < self._kept[0]:
            return False
        self._save(found)
        self._kept = (found.exact, found.step)
        return True

    def restore(self) -> int | None:
        """Put the kept weights back; the step they are of, or None without any."""
        import torch
        from safetensors import safe_open

        if self._kept is None:
            return None
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(file.get_tensor(name))
        return self._kept[1]

    def _save(self, found: Validation) -> None:
        from safetensors.torch import save_file

        part = self.path.with_name(self.path.name + ".part")
        tensors = {name: weight.detach().cpu().contiguous().clone() for name, weight in self._weights.items()}
        save_file(tensors, part, metadata={"validation": json.dumps(asdict(found))})
        part.replace(self.path)

    def _read(self) -> tuple[float, int] | None:
        from safetensors import safe_open

        if not self.path.is_file():
            return None
        with safe_open(self.path, "pt") as file:
            found = json.loads((file.metadata() or {})["validation"])
        return float(found["exact"]), int(found["step"])


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


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
