"""When two short answers say the same: a normal form, and what it can and cannot decide.

Case, spaces, outer punctuation, leading articles and currencies do not count; 1,234.50 is 1234.5 and "two" is 2. Dates
and codes stay as they are written, so that 01/02/2024 and 2024-02-01 are two answers.

When two short answers count as the same: the comparison that stage 3 labels rest on (method.md 8.1).
"""

from __future__ import annotations

import re
import string
import unicodedata
from decimal import Decimal

from qzoom.scoring.metrics import normalise

__all__ = ["answers_match", "lowered", "mentions", "normal", "normalise_answer", "same"]


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS.split())}
_CLOSED = re.compile(r"(yes|no)[,.;:!]")
_NUMBER = re.compile(r"([-+]?)((?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?|\.\d+)")
_LEADING = " \t\r\n\"'`*_([{:;,!?"
_TRAILING = " \t\r\n\"'`*_)]}.:;,!?"


def normal(text: str) -> str:
    """The form in which answers are compared; "" for a text without content."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join(plain.split()).lstrip(_LEADING).rstrip(_TRAILING)
    closed = _CLOSED.match(plain)
    if closed:
        return closed[1]
    if plain in _NUMBER_WORDS:
        return _NUMBER_WORDS[plain]
    amount = normalise(plain)
    number = _NUMBER.fullmatch(amount)
    if number:
        return _plain_number(number[1], number[2])
    if any(character.isdigit() for character in plain):
        return amount
    for article in ("the ", "a ", "an "):
        plain = plain.removeprefix(article)
    letters = "".join(c for c in plain if not c.isspace() and unicodedata.category(c)[0] not in "PS")
    return letters or "".join(plain.split())


def same(first: str, second: str) -> bool | None:
    """Whether two answers say the same; None where rules cannot tell.

    Two different numbers, codes, dates or yes and no never do.
    """
    one, other = normal(first), normal(second)
    if one == other:
        return bool(one)
    if not one or not other or (_decided(first) and _decided(second)):
        return False
    return None


def mentions(text: str, answer: str) -> bool:
    """Whether a text holds an answer as words of their own."""
    wanted = " ".join(answer.casefold().split())
    held = " ".join(text.casefold().split())
    start = held.find(wanted) if wanted else -1
    while start >= 0:
        stop = start + len(wanted)
        before, after = held[start - 1 : start], held[stop : stop + 1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = held.find(wanted, start + 1)
    return False


def _plain_number(sign: str, digits: str) -> str:
    value = Decimal(digits.replace(",", "")).normalize()
    return ("-" if sign == "-" and value else "") + format(value, "f")


def _decided(text: str) -> bool:
    """A number, yes or no, or one word with digits (a code, a date): it means nothing but itself."""
    plain = normal(text)
    if plain in ("yes", "no") or _NUMBER.fullmatch(plain):
        return True
    return len(text.split()) == 1 and any(character.isdigit() for character in plain)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(answer: object) -> str:
    """Lower case, without outer white space and ASCII punctuation; what is not a text is only turned into one.

    White space that punctuation leaves at the ends stays, as in the release.
    """
    if not isinstance(answer, str):
        return str(answer)
    return answer.lower().strip().translate(_NO_PUNCTUATION)


def lowered(answer: object) -> str:
    """The gentler form in which the release reads annotations: punctuation stays."""
    return str(answer).lower().strip()


def answers_match(one: str, other: str) -> bool:
    """Whether one normalised answer contains the other; an empty answer therefore matches everything."""
    return one in other or other in one
