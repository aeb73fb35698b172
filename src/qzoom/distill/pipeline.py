"""The steps of a recipe, and one image through all of them.

What is stored is taken, what is missing is computed. `process_picture` writes nothing, so that it can run on another
machine: new results come back as rows for the store.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qzoom.distill.ask import answer_step, ask_step, validate_step
from qzoom.distill.choices import ChoicesStep
from qzoom.distill.difficulty import difficulty_step
from qzoom.distill.items import ImageRef, Item, Step, apply, item_from_values
from qzoom.distill.known import Key
from qzoom.distill.pictures import ImageSource, Loaded, Views, scan
from qzoom.distill.proposers import crop_step, propose_step
from qzoom.distill.recipe import DatasetRecipe
from qzoom.distill.roles import Roles
from qzoom.distill.vote import vote_step
from qzoom.errors import ConfigError, DataError, ImageError, LaterError
from qzoom.store.schema import from_values

SCAN = "pictures"
"""Name under which the records of opened images are stored."""
Stored = Callable[[str, str], list[Any] | None]
Row = tuple[str, str, list[Any]]
Advance = Callable[[int, int], None]
_MADE_QUESTIONS = ("validate", "choices")


@dataclass(slots=True)
class PictureResult:
    """The result of one image."""

    source: ImageSource  # where it came from
    picture: ImageRef | None = None  # its record; None when it cannot be used
    reason: str = ""  # why not
    items: list[Item] = field(default_factory=list)  # all items in their last state, in order
    rows: list[Row] = field(default_factory=list)  # (step, key of the input, results) that the store does not hold yet
    waiting: list[str] = field(default_factory=list)  # reasons of items that a rerun has to try again
    counts: list[tuple[str, int, int]] = field(default_factory=list)  # (step, items that went in, items that it kept)


def process_picture(
    source: ImageSource, steps: Mapping[str, Step], views: Views, key_of: Key, stored: Stored
) -> PictureResult:
    """Take an image through the steps, in order; `stored` gives the results that are there for a step and a key
    (StopRunError: the run cannot go on; DataError: a stored line is damaged)."""
    result = PictureResult(source)
    loaded = _open(result, stored)
    if result.picture is None:
        return result
    with views.working_on(result.picture, source.questions, loaded):
        items = [Item(result.picture)]
        for name, step in steps.items():
            entered = sum(item.kept for item in items)
            out: list[Item] = []
            for item in items:
                if item.kept:
                    at = name, key_of(name, item, source.questions)
                    out += _run_step(step, item, at, result, stored)
                else:
                    out.append(item)
            items = _without_repeats(out, name) if name in _MADE_QUESTIONS else out
            result.counts.append((name, entered, sum(item.kept for item in items)))
        result.items = items
    return result


def _open(result: PictureResult, stored: Stored) -> Loaded | None:
    """Fill in the image's record or the reason why there is none."""
    source = result.source
    rows = stored(SCAN, source.key)
    loaded: Loaded | None = None
    if rows is None:
        try:
            picture, loaded = scan(source)
            rows = [dataclasses.asdict(picture)]
        except (ImageError, DataError) as error:
            rows = [{"refused": str(error)}]
        result.rows.append((SCAN, source.key, rows))
    if "refused" in rows[0]:
        result.reason = str(rows[0]["refused"])
    else:
        record: ImageRef = from_values(ImageRef, rows[0], f"the picture {source.source}")
        result.picture = dataclasses.replace(record, source=source.source, root=source.root, dataset=source.dataset)
    return loaded


def _run_step(step: Step, item: Item, at: tuple[str, str], result: PictureResult, stored: Stored) -> Sequence[Item]:
    """One kept item through one step; nothing for one that has to wait. `at`: name of the step, key of its results."""
    name, key = at
    rows = stored(name, key)
    if rows is not None:
        return [_item(row, item.picture, name) for row in rows]
    try:
        out = apply(name, step, item)
    except LaterError as error:
        result.waiting.append(str(error))
        return ()
    result.rows.append((name, key, [_plain(one) for one in out]))
    return out


def _without_repeats(items: Sequence[Item], step: str) -> list[Item]:
    """Of kept items that ask the same about one image, the first stays."""
    seen: set[tuple[str, bool]] = set()
    out = []
    for item in items:
        if item.kept and item.draft is not None:
            question = (item.draft.text, item.draft.negative)
            if question in seen:
                item = item.decide(step, "asked already about another place of this picture")
            seen.add(question)
        out.append(item)
    return out


def _plain(item: Item) -> dict[str, Any]:
    """An item as it is stored: without its image, which has a line of its own."""
    values: dict[str, Any] = json.loads(item.to_json())
    del values["picture"]
    return values


def _item(values: dict[str, Any], picture: ImageRef, step: str) -> Item:
    try:
        return item_from_values({**values, "picture": dataclasses.asdict(picture)}, "an item")
    except DataError as error:
        raise ConfigError(
            f"The results of the step {step} cannot be read ({error}); restore them from a copy, or use --fresh."
        ) from error


def make_steps(recipe: DatasetRecipe, views: Views, roles: Roles) -> dict[str, Step]:
    """The steps of a recipe by name, in order, without the export."""
    agreement = recipe.vote if recipe.answer.give_up else None
    judged = roles.judge is not None
    steps = {
        "propose": propose_step(recipe.propose, views, recipe.seed),
        "crop": crop_step(recipe.crop),
        "ask": ask_step(roles.question_writer, views),
        "validate": validate_step(roles.validator, views),
        "answer": answer_step(roles.teachers, views, recipe.answer.samples, agreement, judged=judged),
        "vote": vote_step(recipe.vote, roles.judge),
    }
    if recipe.choices is not None:
        steps["choices"] = ChoicesStep(roles.distractor_writer, views, recipe.choices, roles.guesser, roles.judge)
    if recipe.difficulty is not None and roles.student is not None:
        steps["difficulty"] = difficulty_step(roles.student, views, recipe.difficulty, roles.judge)
    return steps
