"""How good the student is on its own held-out pictures: exact match on the plain full view, nothing marked.

It is asked exactly as a user would, by the engine, greedily. Questions whose target is absent are counted apart: a
student that only learns to say yes gets worse on them while the total rises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.engine.state import Engine
from qzoom.training.distill.data import Question
from qzoom.training.distill.prompts import Prompter
from qzoom.training.distill.recipe import DistillRecipe
from qzoom.training.distill.rewards import Target, accuracy

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Best", "Validation", "Validator", "some_of"]

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
