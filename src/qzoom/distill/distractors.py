"""Distractors: wrong answers of the same format (another code, date, amount, colour or name)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from qzoom.scoring.agree import normal

_CLOSED: tuple[tuple[str, ...], ...] = (("yes", "no"), ("left", "right"))
_WIDE: tuple[tuple[str, ...], ...] = (
    ("receipt", "form", "table", "invoice"),
    ("white", "grey", "brown", "cyan"),
    ("circle", "square", "triangle", "diamond", "star", "cross"),
)
_DATE = re.compile(r"\d{1,4}[-/. ](?:\d{1,2}|[A-Za-z]{3,9})[-/. ]\d{2,4}")
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?( ?[AaPp][Mm])?")
_WHOLE = re.compile(r"\d{1,2}")
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
    """Up to `count` different wrong answers.

    Args:
        answer: the right one.
        count: most of them.
        rng: draws them.
        pool: other values of the picture; those of the answer's format come first.
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
    from qzoom.data.synthetic.texts import COLOURS

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
    import numpy as np

    from qzoom.data.synthetic import texts

    numbers = np.random.default_rng(rng.getrandbits(63))
    makers = (texts.company, texts.person, texts.item_name)
    drawn = [make(numbers) for make in makers for _ in range(3)]
    words = len(answer.split())
    name = min(drawn, key=lambda text: abs(len(text.split()) - words))
    return name if answer.isupper() else name.title()


_CHANGES: tuple[tuple[Callable[[str], object], Callable[[str, random.Random], str]], ...] = (
    (_DATE.fullmatch, _date),
    (_TIME.fullmatch, _time),
    (_WHOLE.fullmatch, _near),
    (lambda text: any(c.isdigit() and c.isascii() for c in text), _other_signs),
    (_LETTER_CODE.fullmatch, _other_signs),
    (bool, _name),
)
