"""One picture through all steps: what is stored is taken, what is missing is computed.

Both engines run this. It writes nothing itself, so that it can run on another machine: new results come back as rows
for the store.

The steps of a recipe, ready to run: in this process, or in each of Ray's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.distill.answer import AnswerStep
from qzoom.distill.ask import AskStep, ValidateStep
from qzoom.distill.choices import ChoicesStep
from qzoom.distill.crop import CropStep
from qzoom.distill.difficulty import DifficultyStep
from qzoom.distill.items import ITEM_SCHEMA, Item, Picture, Step, apply
from qzoom.distill.pictures import Loaded, Source, scan
from qzoom.distill.proposers import make_propose_step
from qzoom.distill.recipe import DistillRecipe
from qzoom.distill.views import PictureViews
from qzoom.distill.vote import VoteStep
from qzoom.errors import ConfigError, DataError, ImageError, InternalError, LaterError
from qzoom.store.schema import from_values

if TYPE_CHECKING:
    from qzoom.distill.build import Roles

__all__ = ["CACHE", "SCAN", "Done", "Pipeline", "Row", "Stored", "follow", "named_steps", "open_pipeline"]


SCAN = "pictures"
"""The name under which opened pictures are stored."""
Stored = Callable[[str, str], list[Any] | None]
Row = tuple[str, str, list[Any]]
_MADE_QUESTIONS = ("validate", "choices")


@dataclass(slots=True)
class Done:
    """What became of one picture.

    Args:
        source: where it came from.
        picture: its record; None when it cannot be used.
        reason: why not.
        items: all items in their last state, in order.
        rows: (step, key of the input, results) that the store does not hold yet.
        waiting: items that a rerun has to try again, with the reasons.
        counts: (step, items that went in, items that it kept).
    """

    source: Source
    picture: Picture | None = None
    reason: str = ""
    items: list[Item] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    counts: list[tuple[str, int, int]] = field(default_factory=list)


def follow(
    source: Source, steps: Sequence[Step], views: PictureViews, stored: Stored, compute: frozenset[str] | None = None
) -> Done:
    """Take a picture through the steps.

    Args:
        source: the picture.
        steps: in order.
        views: where its pixels are kept meanwhile.
        stored: what a step made of an input, None when nothing yet.
        compute: names of the steps that may compute what is missing (`SCAN` opens the picture); None for all.

    Raises:
        StopRunError: the run cannot go on.
        DataError: a stored line is damaged.
    """
    done = Done(source)
    loaded = _open(done, stored, compute)
    if done.picture is None:
        return done
    with views.working_on(done.picture, source.questions, loaded):
        items = [Item(done.picture)]
        for step in steps:
            made: list[Item] = []
            for item in items:
                made += _step(step, item, done, stored, compute)
            entered = sum(item.kept for item in items)
            items = _once(made, step.name) if step.name in _MADE_QUESTIONS else made
            done.counts.append((step.name, entered, sum(item.kept for item in items)))
        done.items = items
    return done


def _open(done: Done, stored: Stored, compute: frozenset[str] | None) -> Loaded | None:
    """Fill in the picture's record or the reason why there is none."""
    source = done.source
    key = source.key
    rows = stored(SCAN, key)
    loaded: Loaded | None = None
    if rows is None:
        if compute is not None and SCAN not in compute:
            done.waiting.append("the picture was not opened yet")
            return None
        try:
            picture, loaded = scan(source)
            rows = [dataclasses.asdict(picture)]
        except (ImageError, DataError) as error:
            rows = [{"refused": str(error)}]
        done.rows.append((SCAN, key, rows))
    if "refused" in rows[0]:
        done.reason = str(rows[0]["refused"])
    else:
        found: Picture = from_values(Picture, rows[0], f"the picture {source.source}")
        done.picture = dataclasses.replace(found, source=source.source, root=source.root, dataset=source.dataset)
    return loaded


def _step(step: Step, item: Item, done: Done, stored: Stored, compute: frozenset[str] | None) -> Sequence[Item]:
    """One item through one step; nothing comes back for an item that has to wait."""
    if not item.kept:
        return (item,)
    key = item.id
    rows = stored(step.name, key)
    if rows is not None:
        return [_item(row, item.picture, step.name) for row in rows]
    if compute is not None and step.name not in compute:
        done.waiting.append(f"the step {step.name} has not been run")
        return ()
    try:
        made = apply(step, item)
    except LaterError as error:
        done.waiting.append(str(error))
        return ()
    done.rows.append((step.name, key, [_plain(one) for one in made]))
    return made


def _once(items: Sequence[Item], step: str) -> list[Item]:
    """Of kept items that ask the same about one picture, the first stays."""
    seen: set[tuple[str, bool]] = set()
    out = []
    for item in items:
        if item.kept and item.asked is not None:
            asked = (item.asked.text, item.asked.negative)
            if asked in seen:
                item = item.decide(step, False, "asked already about another place of this picture")
            seen.add(asked)
        out.append(item)
    return out


def _plain(item: Item) -> dict[str, Any]:
    """An item as it is stored: without its picture, which the line of the picture holds."""
    values: dict[str, Any] = json.loads(item.to_json())
    del values["picture"]
    return values


def _item(values: Any, picture: Picture, step: str) -> Item:
    try:
        if not isinstance(values, dict) or values.get("schema") != ITEM_SCHEMA:
            raise DataError("items of another schema")
        parts = {key: value for key, value in values.items() if key != "schema"}
        item: Item = from_values(Item, {**parts, "picture": dataclasses.asdict(picture)}, "an item")
    except DataError as error:
        raise ConfigError(
            f"The results of the step {step} cannot be read ({error}); restore them from a copy, or use --fresh."
        ) from error
    return item


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
    from qzoom.distill.build import build_roles

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
        _step_pipeline(name, recipe, views, roles) if compute is None or name in compute else step
        for name, step in ((step.name, step) for step in named_steps(recipe, compute))
    )


def named_steps(recipe: DistillRecipe, compute: frozenset[str] | None) -> tuple[Step, ...]:
    """The steps up to the last one that computes, or all when none does, for reading what is stored."""
    last = max((recipe.steps.index(name) for name in compute or () if name in recipe.steps), default=len(recipe.steps))
    return tuple(_Named(name) for name in recipe.steps[: last + 1])


def _step_pipeline(name: str, recipe: DistillRecipe, views: PictureViews, roles: Roles | None) -> Step:
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
