"""Are two short answers the same? Three rules side by side; each has its place, and none stands in for another.

    exact        `exact_match`, `decide_exact`   equal but for case, spaces, currency and a final mark: figures,
                                                rewards, judging
    agreement    `same`                          also articles, punctuation, 1,234.50 = 1234.5, two = 2: votes
    containment  `answers_match`                 one contains the other, as upstream: labels of the gate (method.md 8.1)

`decide_exact` and `same` leave open what rules cannot tell. A fourth way, that of the evaluation harnesses, belongs to
their metrics: see "harness" in `qzoom.scoring.metrics`. Dates and codes stay as they are written under every rule, so
that 01/02/2024 and 2024-02-01 are two answers.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from qzoom.scoring.text import NUMBER_WORDS, without_final_marks

_CURRENCIES = (
    "rm|myr|usd|sgd|eur|gbp|jpy|cny|rmb|idr|thb|php|vnd|inr|aud|cad|nzd|hkd|twd|krw|chf|"
    "ringgit|dollars?|euros?|pounds?|yen|yuan"
)
_BEFORE_AMOUNT = re.compile(rf"([-+]?)(?:({_CURRENCIES})|us|sg?|au?|ca?|nz|hk|nt)([-+.\d].*)", re.DOTALL)
_AFTER_AMOUNT = re.compile(rf"(?<=\d)(?:{_CURRENCIES})$")
_AMOUNT = re.compile(r"[-+]?(?:\d[\d.,]*|\.\d+)")
_VALUE = re.compile(r"[-+]?(?:\d[\d.,]*|\.\d+)%?")
_YES_NO = {"yes", "no", "true", "false"}


def normalise(text: str) -> str:
    """The text without case, white space and final marks, and, if it is an amount, without its currency.

    An amount is a number with at most a sign, separators and a currency before or after it. Symbols are those that
    Unicode calls currencies; words are common codes and names, and the letters fixed to a symbol as in US$.
    """
    plain = "".join(without_final_marks(text).casefold().split())
    bare = "".join(c for c in plain if unicodedata.category(c) != "Sc")
    symbols = len(plain) - len(bare)
    before = _BEFORE_AMOUNT.fullmatch(bare)
    if before and (before[2] or symbols):
        bare = before[1] + before[3]
    bare = _AFTER_AMOUNT.sub("", bare)
    return bare if symbols <= 1 and _AMOUNT.fullmatch(bare) else plain


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two texts are equal, case, spaces, currency and marks at the end aside."""
    return normalise(prediction) == normalise(answer)


def decide_exact(prediction: str, answers: Sequence[str]) -> bool | None:
    """The exact rule: True for a match, False for a contradiction, None where it cannot tell.

    Numbers and yes or no contradict any other number or yes or no. An empty prediction is wrong.
    """
    if any(exact_match(prediction, answer) for answer in answers):
        return True
    if not prediction.strip():
        return False
    given = normalise(prediction).rstrip(".")
    expected = [normalise(answer) for answer in answers]
    for kind in (lambda text: _VALUE.fullmatch(text) is not None, lambda text: text in _YES_NO):
        if kind(given) and all(kind(answer) for answer in expected):
            return any(given == answer for answer in expected)
    return None


_NUMBER_WORDS = {word: str(value) for value, word in enumerate(NUMBER_WORDS)}
_CLOSED = re.compile(r"(yes|no)([,.;:!])(.*)", re.DOTALL)
_NUMBER = re.compile(r"([-+]?)((?:0|[1-9]\d*|[1-9]\d{0,2}(?:,\d{3})+)(?:\.\d+)?|\.\d+)")
_LEADING = " \t\r\n\"'`*_([{:;,!?"
_TRAILING = " \t\r\n\"'`*_)]}.:;,!?"
_SIGN = re.compile(r"(?<=[^\W\d_])(?:#|-+(?![-\w]))|[+<>=\u2190-\u2193]")
"""Signs that make another answer in a text without digits: O+ and O-, C# and C++, x < y and x > y."""


def normal(text: str) -> str:
    """The form in which answers are compared; "" for a text without content."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    plain = " ".join(plain.split()).lstrip(_LEADING).rstrip(_TRAILING)
    closed = _closed(plain)
    if closed:
        return closed
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
    signs = {i for found in _SIGN.finditer(plain) for i in range(*found.span())}
    letters = "".join(
        c for i, c in enumerate(plain) if not c.isspace() and (i in signs or unicodedata.category(c)[0] not in "PS")
    )
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
    wanted, held = (" ".join(part.casefold().split()) for part in (answer, text))
    alone = rf"(?<![^\W_]){re.escape(wanted)}(?![^\W_])"
    return bool(wanted and re.search(alone, held))


def _closed(plain: str) -> str:
    """The yes or no that a text begins with; "" where "no." may mean "number" ("No. 12", "No: A"), or a digit follows,
    since such a text says more than yes or no."""
    found = _CLOSED.fullmatch(plain)
    if found is None or any(character.isdigit() for character in found[3]):
        return ""
    is_number = found[1] == "no" and found[2] in ".:" and len(re.findall(r"\w+", found[3])) == 1
    return "" if is_number else found[1]


def _plain_number(sign: str, digits: str) -> str:
    """Without separators and final zeros; all other digits stay."""
    value = Decimal(digits.replace(",", ""))
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return ("-" if sign == "-" and value else "") + text


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
