"""Roles without a model: drawn images and question files with boxes know their questions and the answers to them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.texts import COLOURS
from qzoom.distill.items import (
    Item,
    Known,
    KnownQuestion,
    QuestionDraft,
    QuestionKind,
    TargetRegion,
    Vote,
    draft_of,
    target_of,
)
from qzoom.images.geometry import contains, iou
from qzoom.scoring.agree import mentions, normal
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image

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
    out: dict[str, QuestionDraft] = {}
    for question in questions_inside(target_of(item), views.known(item).questions):
        draft = QuestionDraft(question.text, kind_of(question), "rule", known=question.answer)
        out.setdefault(question.text, draft)
    return tuple(out.values())


def questions_inside(target: TargetRegion, questions: Sequence[KnownQuestion]) -> list[KnownQuestion]:
    """The questions of an image that can be asked about a target."""
    return [q for q in questions if q.answer and lies_in(q, target.crop_box) and _is_about(q, target.box)]


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
    """The known answer, or with the share `error_rate` a similar wrong one: for tests and throughput only."""
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
    visible = {normal(text) for text, box in known.texts if iou(box, crop)}
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
        return [*(q.answer for q in known.questions), *(text for text, _ in known.texts)]
    fields = {q.field for q in known.questions if q.text == question and q.field}
    return [q.answer for q in known.questions if q.field in fields]


def _is_about(question: KnownQuestion, box: Box4) -> bool:
    """Whether the centre of one of its boxes lies in the tight box."""
    x0, y0, x1, y1 = box
    return any(x0 <= (b[0] + b[2]) / 2 < x1 and y0 <= (b[1] + b[3]) / 2 < y1 for b in question.boxes)


# -- wrong answers -----------------------------------------------------------------------------------------------------

_CLOSED: tuple[tuple[str, ...], ...] = (("yes", "no"), ("left", "right"))
_WIDE: tuple[tuple[str, ...], ...] = (
    ("receipt", "form", "table", "invoice"),
    ("white", "grey", "brown", "cyan"),
    ("circle", "square", "triangle", "diamond", "star", "cross"),
)
_DATE = re.compile(r"\d{1,4}[-/. ](?:\d{1,2}|[A-Za-z]{3,9})[-/. ]\d{2,4}")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?( ?[AaPp][Mm])?")
_SMALL_NUMBER = re.compile(r"\d{1,2}")
_LETTER_CODE = re.compile(r"[A-Z]{1,4}")
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_TRIES = 60


def format_of(answer: str) -> str:
    """The answer's shape: equal shapes can stand in for each other ("AA99", "99.99", "word word")."""
    group = _group(answer)
    if group:
        return "one of " + " ".join(group)
    if not any(c.isdigit() for c in answer):
        return "words"
    shape = re.sub(r"[A-Za-z]", "A", re.sub(r"\d", "9", answer.strip()))
    return re.sub(r"9+(?=\.9)", "9", shape)


def draw_distractors(answer: str, count: int, rng: random.Random, pool: Sequence[str] = ()) -> list[str]:
    """Up to `count` different wrong answers of the same format: another code, date, amount, colour or name.

    Values in `pool`, which stand elsewhere in the picture, come first if they are of that format.
    """
    out: list[str] = []
    shape = format_of(answer)
    fitting = sorted({value for value in pool if format_of(value) == shape})
    rng.shuffle(fitting)
    drawn = (_draw(answer, rng) for _ in range(_TRIES))
    for value in (*fitting, *drawn):
        if len(out) == count:
            break
        if value and all(normal(value) != normal(other) for other in (answer, *out)):
            out.append(value)
    return out


def _group(answer: str) -> tuple[str, ...]:
    plain = normal(answer)
    return next((group for group in (*_CLOSED, tuple(COLOURS), *_WIDE) if plain in group), ())


def _draw(answer: str, rng: random.Random) -> str:
    group = _group(answer)
    if group:
        return _as_written(rng.choice(group), answer)
    for fits, change in _CHANGES:
        if fits(answer):
            return change(answer, rng)
    return ""


def _as_written(word: str, answer: str) -> str:
    if answer.isupper():
        return word.upper()
    return word.capitalize() if answer[:1].isupper() else word


def _date(answer: str, rng: random.Random) -> str:
    """Another day, and sometimes another month; the year stays."""
    parts = re.split(r"([-/. ])", answer)
    year_first = len(parts[0]) == 4
    day = 4 if year_first else 0
    parts[day] = str(rng.randint(1, 28)).zfill(len(parts[day]))
    if parts[2].isdigit() and rng.random() < 0.5:
        parts[2] = str(rng.randint(1, 12)).zfill(len(parts[2]))
    return "".join(parts)


def _time(answer: str, rng: random.Random) -> str:
    found = _TIME.fullmatch(answer)
    if found is None:
        return ""
    hours = str(rng.randint(1, 12) if found[4] else rng.randint(0, 23)).zfill(len(found[1]))
    seconds = f":{rng.randint(0, 59):02d}" if found[3] else ""
    return f"{hours}:{rng.randint(0, 59):02d}{seconds}{found[4] or ''}"


def _near(answer: str, rng: random.Random) -> str:
    """A whole number close by, never below 0."""
    return str(max(0, int(answer) + rng.choice((-4, -3, -2, -1, 1, 2, 3, 4)))).zfill(len(answer))


def _other_signs(answer: str, rng: random.Random) -> str:
    """One or two digits or letters changed; no new zero in front."""
    signs = list(answer)
    indices = [i for i, sign in enumerate(signs) if sign.isascii() and sign.isalnum()]
    digits = [i for i in indices if signs[i].isdigit()]
    for i in rng.sample(digits or indices, k=min(len(digits or indices), rng.choice((1, 1, 2)))):
        if signs[i].isdigit():
            signs[i] = rng.choice("123456789" if i == indices[0] else "0123456789")
        else:
            signs[i] = _as_written(rng.choice(_LETTERS).lower(), signs[i])
    return "".join(signs)


def _name(answer: str, rng: random.Random) -> str:
    """Another drawn name with as many words, where that comes about."""
    numbers = np.random.default_rng(rng.getrandbits(63))
    makers = (texts.company, texts.person, texts.item_name)
    drawn = [make(numbers) for make in makers for _ in range(3)]
    words = len(answer.split())
    name = min(drawn, key=lambda text: abs(len(text.split()) - words))
    return name if answer.isupper() else name.title()


_CHANGES: tuple[tuple[Callable[[str], object], Callable[[str, random.Random], str]], ...] = (
    (_DATE.fullmatch, _date),
    (_TIME.fullmatch, _time),
    (_SMALL_NUMBER.fullmatch, _near),
    (lambda text: any(c.isdigit() and c.isascii() for c in text), _other_signs),
    (_LETTER_CODE.fullmatch, _other_signs),
    (bool, _name),
)
