"""The steps of a recipe, ready to run: in this process, or in each of Ray's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.distill.answer import AnswerStep
from qzoom.distill.ask import AskStep
from qzoom.distill.choices import ChoicesStep
from qzoom.distill.crop import CropStep
from qzoom.distill.difficulty import DifficultyStep
from qzoom.distill.propose.step import make_propose_step
from qzoom.distill.recipe import DistillRecipe
from qzoom.distill.records import Item
from qzoom.distill.steps import Step
from qzoom.distill.validate import ValidateStep
from qzoom.distill.views import PictureViews
from qzoom.distill.vote import VoteStep
from qzoom.errors import InternalError

if TYPE_CHECKING:
    from qzoom.distill.roles.build import Roles

__all__ = ["CACHE", "Pipeline", "named_steps", "open_pipeline"]

CACHE = "calls.sqlite"
_WITHOUT_ROLES = frozenset({"pictures", "propose", "crop"})


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What a run works with.

    Args:
        steps: in order.
        views: what they look at.
        workers: pictures worked on at once.
        roles: who answers; None where nobody is asked.
    """

    steps: tuple[Step, ...]
    views: PictureViews
    workers: int
    roles: Roles | None = None

    def cost(self) -> list[dict[str, Any]]:
        """What calls of this run cost, by role and endpoint; empty without endpoints."""
        return [] if self.roles is None else [asdict(cost) for cost in self.roles.costs()]


@contextmanager
def open_pipeline(
    recipe: DistillRecipe, folder: Path, compute: frozenset[str] | None, workers: int | None = None
) -> Iterator[Pipeline]:
    """The steps of a recipe; connections are closed at the end.

    Args:
        recipe: which.
        folder: of the run; kept calls lie there.
        compute: steps that will compute; None for all. The others are only named.
        workers: pictures at once; None takes the recipe's.

    Raises:
        StopRunError: an endpoint is down or refuses the key.
        ConfigError: the file of kept calls is of another kind.
    """
    workers = workers or recipe.workers
    views = PictureViews(capacity=workers + 1)
    if compute is not None and compute <= _WITHOUT_ROLES:
        yield Pipeline(_steps(recipe, views, None, compute), views, workers)
        return
    from qzoom.distill.roles.build import build_roles

    roles = build_roles(recipe.roles, folder / CACHE)
    try:
        roles.check()
        yield Pipeline(_steps(recipe, views, roles, compute), views, workers, roles)
    finally:
        roles.close()


@dataclass(frozen=True, slots=True)
class _Named:
    """A step whose results are only read."""

    name: str

    def __call__(self, item: Item) -> Sequence[Item]:
        """Never called."""
        raise InternalError(f"The step {self.name} was not to compute anything.")


def _steps(
    recipe: DistillRecipe, views: PictureViews, roles: Roles | None, compute: frozenset[str] | None
) -> tuple[Step, ...]:
    return tuple(
        _step(name, recipe, views, roles) if compute is None or name in compute else step
        for name, step in ((step.name, step) for step in named_steps(recipe, compute))
    )


def named_steps(recipe: DistillRecipe, compute: frozenset[str] | None) -> tuple[Step, ...]:
    """The steps up to the last one that computes, or all when none does, for reading what is stored."""
    last = max((recipe.steps.index(name) for name in compute or () if name in recipe.steps), default=len(recipe.steps))
    return tuple(_Named(name) for name in recipe.steps[: last + 1])


def _step(name: str, recipe: DistillRecipe, views: PictureViews, roles: Roles | None) -> Step:
    """The step of a name."""
    if name == "propose":
        return make_propose_step(recipe.propose, views, recipe.seed)
    if name == "crop":
        return CropStep(recipe.crop)
    if roles is None:
        raise InternalError(f"The step {name} has nobody to ask.")
    if name == "ask":
        return AskStep(roles.asker, views)
    if name == "validate":
        return ValidateStep(roles.validator, views)
    if name == "answer":
        wanted = recipe.vote if recipe.answer.give_up else None
        return AnswerStep(roles.teachers, views, recipe.answer.samples, wanted, roles.judge is not None)
    if name == "vote":
        return VoteStep(recipe.vote, roles.judge)
    if name == "choices" and recipe.choices is not None:
        return ChoicesStep(roles.maker, views, recipe.choices, roles.guesser, roles.judge)
    if recipe.difficulty is None or roles.student is None:
        raise InternalError(f"The step {name} has no settings or nobody to ask.")
    return DifficultyStep(roles.student, views, recipe.difficulty, roles.judge)
