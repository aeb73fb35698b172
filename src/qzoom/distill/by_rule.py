"""Roles without a model: images that know their questions write, check and answer them.

Drawn images and question files with boxes say which questions a region answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qzoom.distill.distractors import draw_distractors
from qzoom.distill.items import Item, QuestionDraft, QuestionKind, Vote, draft_of, target_of
from qzoom.distill.select import iou
from qzoom.images.geometry import contains
from qzoom.scoring.agree import mentions, normal
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.items import Known, KnownQuestion
    from qzoom.distill.pictures import Views

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


def write_questions(item: Item, views: Views) -> Sequence[QuestionDraft]:
    """The image's own questions that are answered inside the crop, most of the answer inside the tight box."""
    target = target_of(item)
    out: dict[str, QuestionDraft] = {}
    for question in views.known(item).questions:
        if question.answer and lies_in(question, target.crop_box) and _is_about(question, target.box):
            draft = QuestionDraft(question.text, kind_of(question), "rule", known=question.answer)
            out.setdefault(question.text, draft)
    return tuple(out.values())


def validate(item: Item, views: Views) -> str:
    """Why a question cannot be used, by all that is known about the image; "" when it can."""
    draft, target = draft_of(item), target_of(item)
    like = [q for q in views.known(item).questions if q.text == draft.text]
    if not like:
        return "a question that the picture does not know"
    if not any(lies_in(question, target.crop_box) for question in like):
        return "not answerable from the crop"
    if any(question.field == _WHOLE for question in like):
        return "a count of the whole picture, which no crop shows"
    if len({normal(question.answer) for question in like}) > 1:
        return "not unique in the whole picture"
    return ""


def answer(item: Item, views: Views, sample: int, *, name: str, error_rate: float) -> Vote:
    """The known answer, or a similar wrong one: for tests and throughput, never for results.

    Args:
        item: with its question.
        views: not looked at.
        sample: number of the sample.
        name: of the teacher.
        error_rate: share of wrong answers, drawn from the item.
    """
    known = draft_of(item).known
    if not known:
        return Vote(name, sample, "", "abstained")
    rng = random.Random(f"{item.seed}/{item.id}/{name}/{sample}")
    if rng.random() >= error_rate:
        return Vote(name, sample, known)
    wrong = draw_distractors(known, 1, rng)
    return Vote(name, sample, wrong[0]) if wrong else Vote(name, sample, "", "failed", "no wrong answer")


def write_distractors(item: Item, views: Views, count: int) -> Sequence[str]:
    """Wrong options of the answer's format: values from elsewhere in the image, then changed ones; none of them stands
    in the crop."""
    if item.answer is None:
        return ()
    known, crop = views.known(item), target_of(item).crop_box
    visible = {normal(text.text) for text in known.texts if iou(text.box, crop)}
    visible |= {normal(q.answer) for q in known.questions if any(iou(box, crop) for box in q.boxes)}
    rng = random.Random(f"{item.seed}/{item.id}/distractors")
    values = _values_like(item.answer.text, draft_of(item).text, known)
    pool = [value for value in values if normal(value) not in visible]
    drawn = draw_distractors(item.answer.text, count + len(visible), rng, pool)
    return [value for value in drawn if normal(value) not in visible][:count]


def read(item: Item, image: Image | None, text: str, sample: int, *, name: str, error_rate: float) -> Vote:
    """The right letter or answer, or none: a student for tests and throughput, never for results."""
    right = "" if item.answer is None else item.answer.text
    right = right if item.choices is None else item.choices.letter
    wrong = random.Random(f"{item.seed}/{item.id}/{name}/{sample}").random() < error_rate
    return Vote(name, sample, "", "abstained") if wrong or not right else Vote(name, sample, right)


def lies_in(question: KnownQuestion, box: Box4) -> bool:
    """Whether a box holds all that a question needs: one box of a printed answer, every object of a count."""
    inside = [contains(box, other) for other in question.boxes]
    return bool(inside) and (all(inside) if question.field in _ALL_BOXES else any(inside))


def kind_of(question: KnownQuestion) -> QuestionKind:
    """The kind of a known question, by its field or else by its words."""
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
    """Whether the centre of one of its boxes lies in the tight box."""
    x0, y0, x1, y1 = box
    return any(x0 <= (b[0] + b[2]) / 2 < x1 and y0 <= (b[1] + b[3]) / 2 < y1 for b in question.boxes)
