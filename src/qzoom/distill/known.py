"""Keys under which results of a step are stored: of the item, and of the image's own questions that decide them.

A result depends on the questions that come with an image in a question file (answers, boxes, texts) only where a step
uses them. Each step's key holds the questions that it or an earlier step used for this item and no others, so that a
corrected answer or an added question leaves other items alone. Without own questions a key is the item's id. Drawn
images know their questions by their number and need no more than the id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from qzoom.distill.by_rule import questions_inside
from qzoom.distill.items import Item, KnownQuestion, target_of
from qzoom.distill.recipe import DatasetRecipe

Key = Callable[[str, Item, Sequence[KnownQuestion]], str]
"""From a step, an item that enters it and its image's own questions to the key of the results."""
_Facts = Callable[[Item, Sequence[KnownQuestion]], Any]
"""What decides a result, as JSON values; None for nothing."""


def make_key(recipe: DatasetRecipe) -> Key:
    """The keys of a recipe's results."""
    uses = {step: _uses(recipe, step) for step in recipe.steps}

    def key(step: str, item: Item, questions: Sequence[KnownQuestion]) -> str:
        facts = [use(item, questions) for use in uses[step]] if questions else []
        if all(fact is None for fact in facts):
            return item.id
        text = json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return f"{item.id}-{hashlib.sha256(text).hexdigest()[:20]}"

    return key


def _uses(recipe: DatasetRecipe, step: str) -> list[_Facts]:
    """What of the own questions a step's results depend on."""
    propose, roles = recipe.propose, recipe.roles
    number = recipe.steps.index(step)
    uses: list[_Facts] = []
    if "maps" in propose.by and propose.maps.own_questions:
        uses.append(_texts)
    if step == "propose" and "given" in propose.by and propose.given.questions:
        uses.append(_boxes)
    if step == "ask" and roles.question_writer.by == "rule":
        uses.append(_inside)
    if number > recipe.steps.index("ask"):
        uses.append(_same)
    writer = roles.distractor_writer if recipe.choices is not None else None
    if writer is not None and writer.by == "rule" and number >= recipe.steps.index("choices"):
        uses.append(_all)
    return uses


def _texts(item: Item, questions: Sequence[KnownQuestion]) -> list[str]:
    """What region maps are asked for."""
    return [question.text for question in questions]


def _boxes(item: Item, questions: Sequence[KnownQuestion]) -> list[Any]:
    """Boxes that are proposed, each once; they are in the ids of the items, so that later steps need no more."""
    return list(dict.fromkeys(box for question in questions for box in question.boxes))


def _inside(item: Item, questions: Sequence[KnownQuestion]) -> list[list[str]]:
    """Questions that the rule writes about a target."""
    return [[question.text, question.answer] for question in questions_inside(target_of(item), questions)]


def _same(item: Item, questions: Sequence[KnownQuestion]) -> list[Any] | None:
    """What is known about the item's question: its right answer, which the item carries, and its boxes."""
    text = "" if item.draft is None else item.draft.text
    return [[question.answer, question.boxes] for question in questions if question.text == text] or None


def _all(item: Item, questions: Sequence[KnownQuestion]) -> list[Any]:
    """Everything: wrong options are drawn from the answers to the other questions."""
    return [dataclasses.astuple(question) for question in questions]
