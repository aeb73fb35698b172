"""Roles that need no model: pictures that know their questions ask, check and answer for themselves.

Drawn pictures and question files with boxes say which questions a place answers. The teacher by rule is for tests and
for measuring throughput only: it is told the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qzoom.distill.distractors import lookalikes
from qzoom.distill.items import Asked, Item, QuestionKind, Vote
from qzoom.distill.roles import asked_of, region_of
from qzoom.images.geometry import contains
from qzoom.scoring.agree import mentions, normal
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.items import Known, KnownQuestion, Views

__all__ = ["RuleAsker", "RuleMaker", "RuleReader", "RuleTeacher", "RuleValidator", "kind_of", "leak", "lies_in"]


_KINDS: dict[str, QuestionKind] = {
    "count": "counting",
    "colour_of": "colour",
    "stamp_colour": "colour",
    "background": "colour",
    "exists": "identification",
    "stamp": "identification",
    "kind": "identification",
    "side": "spatial",
}
_ALL_BOXES = ("count", "side")
_WHOLE = "count"
_POINTERS = (
    "this crop|the crop|cropped image|cropped picture|cropped region|bounding box|marked region|marked area|"
    "highlighted region|highlighted area|zoomed-in|zoomed in|enlarged part"
)


@dataclass(frozen=True, slots=True)
class RuleAsker:
    """Asks what the picture's own questions ask about the place."""

    name: str = "rule"
    model: str = "rule"

    def ask(self, item: Item, views: Views) -> Sequence[Asked]:
        """The picture's questions that are answered inside the crop, most of it inside the tight box."""
        region = region_of(item)
        out: dict[str, Asked] = {}
        for question in views.known(item).questions:
            if question.answer and lies_in(question, region.crop_box) and _is_about(question, region.box):
                kind = kind_of(question)
                out.setdefault(question.text, Asked(question.text, kind, self.name, known=question.answer))
        return tuple(out.values())


@dataclass(frozen=True, slots=True)
class RuleValidator:
    """Checks a question against all that is known about the picture."""

    name: str = "rule"
    model: str = "rule"

    def check(self, item: Item, views: Views) -> str:
        """Why the question cannot be used; "" when it can."""
        asked, region = asked_of(item), region_of(item)
        like = [q for q in views.known(item).questions if q.text == asked.text]
        if not like:
            return "a question that the picture does not know"
        if not any(lies_in(question, region.crop_box) for question in like):
            return "not answerable from the crop"
        if any(question.field == _WHOLE for question in like):
            return "a count of the whole picture, which no crop shows"
        if len({normal(question.answer) for question in like}) > 1:
            return "not unique in the whole picture"
        return ""


@dataclass(frozen=True, slots=True)
class RuleTeacher:
    """Knows the answer, and errs as often as it is told: for tests and throughput, never for results.

    Args:
        name: of the teacher.
        error_rate: share of wrong answers, drawn from the item.
        model: what the items note.
    """

    name: str = "knows-the-answer"
    error_rate: float = 0.0
    model: str = "rule that knows the answer"

    def answer(self, item: Item, views: Views, sample: int) -> Vote:
        """The known answer, or now and then one that looks like it."""
        known = asked_of(item).known
        if not known:
            return Vote(self.name, sample, "", "abstained")
        rng = random.Random(f"{item.seed}/{item.id}/{self.name}/{sample}")
        if rng.random() >= self.error_rate:
            return Vote(self.name, sample, known)
        wrong = lookalikes(known, 1, rng)
        return Vote(self.name, sample, wrong[0]) if wrong else Vote(self.name, sample, "", "failed", "no wrong answer")


@dataclass(frozen=True, slots=True)
class RuleMaker:
    """Wrong options of the answer's format: values from elsewhere in the picture, then changed ones."""

    name: str = "rule"
    model: str = "rule"

    def distractors(self, item: Item, views: Views, count: int) -> Sequence[str]:
        """None of them stands in the crop."""
        if item.answer is None:
            return ()
        known, crop = views.known(item), region_of(item).crop_box
        shown = {normal(text.text) for text in known.texts if overlap(text.box, crop)}
        shown |= {normal(q.answer) for q in known.questions if any(overlap(box, crop) for box in q.boxes)}
        rng = random.Random(f"{item.seed}/{item.id}/distractors")
        pool = [
            value for value in _values_like(item.answer.text, asked_of(item).text, known) if normal(value) not in shown
        ]
        made = lookalikes(item.answer.text, count + len(shown), rng, pool)
        return [value for value in made if normal(value) not in shown][:count]


@dataclass(frozen=True, slots=True)
class RuleReader:
    """A student that knows the answer and errs as often as it is told: for tests and throughput, never for results.

    Args:
        name: of the student.
        error_rate: share of wrong answers, drawn from the item.
        model: what the items note.
    """

    name: str = "knows-the-answer"
    error_rate: float = 0.0
    model: str = "rule that knows the answer"

    def read(self, item: Item, image: Image | None, text: str, sample: int) -> Vote:
        """The right letter or answer, or none."""
        right = "" if item.answer is None else item.answer.text
        right = right if item.choices is None else item.choices.letter
        wrong = random.Random(f"{item.seed}/{item.id}/{self.name}/{sample}").random() < self.error_rate
        return Vote(self.name, sample, "", "abstained") if wrong or not right else Vote(self.name, sample, right)


def overlap(first: Box4, second: Box4) -> bool:
    """Whether two boxes share a pixel."""
    return max(first[0], second[0]) < min(first[2], second[2]) and max(first[1], second[1]) < min(first[3], second[3])


def lies_in(question: KnownQuestion, box: Box4) -> bool:
    """Whether a box holds all that a question needs: one place of a printed answer, every object of a count."""
    held = [contains(box, place) for place in question.boxes]
    return bool(held) and (all(held) if question.field in _ALL_BOXES else any(held))


def kind_of(question: KnownQuestion) -> QuestionKind:
    """What a known question tests; from its words where it has no field."""
    if question.field:
        return _KINDS.get(question.field, "ocr")
    words = question.text.casefold()
    if words.startswith(("how many", "count ")):
        return "counting"
    if "colour" in words or "color" in words:
        return "colour"
    if normal(question.answer) in ("yes", "no"):
        return "identification"
    return "ocr"


def leak(question: str, answer: str = "") -> str:
    """Why a question gives too much away: it points at the crop or box, or holds the answer; "" when it does not.

    A question that offers alternatives ("left or right of") may name the answer.
    """
    if any(mentions(question, pointer) for pointer in _POINTERS.split("|")):
        return "the question points at the crop or a box"
    if answer and normal(answer) not in ("yes", "no") and not mentions(question, "or") and mentions(question, answer):
        return "the question holds the answer"
    return ""


def _values_like(answer: str, question: str, known: Known) -> list[str]:
    """The picture's values that could be an answer: of a name only other answers to the same field, else all that is
    printed."""
    if any(character.isdigit() for character in answer):
        return [*(q.answer for q in known.questions), *(text.text for text in known.texts)]
    fields = {q.field for q in known.questions if q.text == question and q.field}
    return [q.answer for q in known.questions if q.field in fields]


def _is_about(question: KnownQuestion, box: Box4) -> bool:
    """Whether the middle of one of its places lies in the tight box."""
    x0, y0, x1, y1 = box
    return any(x0 <= (b[0] + b[2]) / 2 < x1 and y0 <= (b[1] + b[3]) / 2 < y1 for b in question.boxes)
