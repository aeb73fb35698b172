"""Questions about what is not there, each paired with the question about what is.

A question names a thing (a red star, an item, a label); with another thing in its place that the picture is known not
to have, its right answer is "none", "no" or "0". Only pictures whose contents are known have such negatives; the other
kind, choices without the right option, needs no knowledge (`qzoom.distill.choices`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from qzoom.distill.compare import mentions, normal
from qzoom.distill.records import Agreement, Asked, Item
from qzoom.distill.roles.base import asked_of
from qzoom.distill.steps import Known, KnownQuestion

__all__ = ["NONE_ANSWER", "absent"]

NONE_ANSWER = "none"
_TRIES = 50


def absent(item: Item, known: Known) -> Item | None:
    """The negative of an item: its question about something that the picture does not have.

    Args:
        item: a positive with its answer.
        known: about its picture.

    Returns:
        The item with the same region, answered by rule; None when the question names nothing that can be exchanged.
    """
    asked = asked_of(item)
    rng = random.Random(f"{item.seed}/{item.id}/absent")
    question = next((q for q in known.questions if q.text == asked.text), None)
    field = "" if question is None else question.field
    text = _other_object(asked.text, field, known, rng) or _other_name(asked.text, field, known, rng)
    if not text or any(q.text == text for q in known.questions):
        return None
    answer = _answer(field, question)
    return dataclasses.replace(
        item,
        asked=Asked(text, asked.kind, "rule", True, item.id, answer),
        votes=(),
        answer=Agreement(answer, 0, 0, (), "rule"),
        choices=None,
        difficulty=None,
    )


def _answer(field: str, question: KnownQuestion | None) -> str:
    if field == "count":
        return "0"
    closed = question is not None and normal(question.answer) in ("yes", "no")
    return "no" if closed else NONE_ANSWER


def _other_object(text: str, field: str, known: Known, rng: random.Random) -> str:
    """Another colour and shape, or for counts another shape, that no object has."""
    from qzoom.synthetic.wording import COLOURS, SHAPES

    if not known.objects or field == "side":
        return ""
    if field == "count":
        shape = next((s for s in SHAPES if mentions(text, _plural(s))), "")
        free = [s for s in SHAPES if all(thing.shape != s for thing in known.objects)]
        return text.replace(_plural(shape), _plural(rng.choice(free))) if shape and free else ""
    there = {(thing.colour, thing.shape) for thing in known.objects}
    named = next((f"{colour} {shape}" for colour, shape in sorted(there) if mentions(text, f"{colour} {shape}")), "")
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    return text.replace(named, " ".join(rng.choice(pairs))) if named and pairs else ""


def _other_name(text: str, field: str, known: Known, rng: random.Random) -> str:
    """Another item for a price or cell, another label for a labelled value, that is printed nowhere."""
    from qzoom.synthetic import texts

    printed = [line.text for line in known.texts]
    if field == "value":
        labels = [label.casefold() for label in texts.LABELS]
        name = max((label for label in labels if mentions(text, label)), key=len, default="")
        free = [label for label in labels if not _held(label, printed)]
        return text.replace(name, rng.choice(free)) if name and free else ""
    if field not in ("price", "cell"):
        return ""
    name = max((line for line in printed if len(line) > 2 and mentions(text, line)), key=len, default="")
    if not name or name not in text:
        return ""
    import numpy as np

    numbers = np.random.default_rng(rng.getrandbits(63))
    for _ in range(_TRIES):
        other = texts.item_name(numbers)
        if not _held(other, printed):
            return text.replace(name, other)
    return ""


def _held(name: str, printed: Sequence[str]) -> bool:
    return any(name.casefold() in line.casefold() for line in printed)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
