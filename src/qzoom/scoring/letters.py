"""Which option of a multiple-choice question an answer names: clearly, or as lmms-eval's tasks read it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qzoom.scoring.text import plain as _plain
from qzoom.scoring.text import without_final_marks

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BARE_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:,;]?", re.IGNORECASE)
_LEADING_LETTER = re.compile(
    r"(?:[(\[]([A-Za-z])[)\]][.:,]?(?=\s|$)|([A-Z])(?:[.):](?=\s|$)|(?=\s+[-\u2013\u2014]\s)))"
)
_JOINED = r"(?:\b(?:or|and)\b|[/,&])"
_BEFORE = re.compile(r"\b[A-Z]\b[)\]\"']*\s*(?:,?\s*\b(?:or|and)\b|[/&])\s*[(\[\"']*$")
_LETTER_AND_TEXT = re.compile(r"[(\[]?([A-Z])[)\]]?[\s.:,;)\u2013\u2014-]*(\S.*)", re.IGNORECASE | re.DOTALL)
_STATED_LETTER = re.compile(
    r"""\b(?:answer|option|choice)(?:\s+is)?\s*[:\uff1a=-]?\s*["'\u201c(\[]*(?!(?-i:a)\s+\w)([A-Z])\b(?!')"""
    r"""|(?-i:\b([A-Z])\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b)""",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_STYLED = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}|</?(?:b|i|em|strong|code)>|\\[()\[\]]")
_EMPHASISED = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`+|\$+)(?=\S)(.+?)(?<=\S)\1(?!\w)", re.DOTALL)
_EMPHASISED_LETTER = re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|`+|\$+)[(\[]?([A-Z])[)\]]?[.:,]?\1(?!\w)")


def chosen_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer clearly names; None where it names none or several.

    Clear are a letter alone, also on the first or last line, one that leads ("B. the red one"), one that is stated
    ("the answer is B"), one letter in a box or in bold, the whole text of one option, and a letter followed by the text
    of its own option. Thoughts, answer tags and markup (`**B**`, `\\boxed{B}`, `$B$`) are taken off first.

    Args:
        choices: the options' texts, A first.
    """
    text = prediction.rpartition("</think>")[2]
    tags = _ANSWER_TAG.findall(text)
    text = tags[-1] if tags else text
    boxes = _BOXED.findall(text)
    named = {_named(part, choices) for part in boxes or [text]}
    return named.pop() if len(named) == 1 else None


def _named(text: str, choices: Sequence[str]) -> str | None:
    known = LETTERS[: len(choices)]
    styled = _STYLED.sub(lambda found: found[1] or "", text).strip().lstrip("#").lstrip()
    plain = styled
    while plain != (plain := _EMPHASISED.sub(r"\2", plain)):
        pass
    plain = without_final_marks(plain)
    bare, leading = _BARE_LETTER.fullmatch(plain), _LEADING_LETTER.match(plain)
    if bare:
        found = [bare[1]]
    elif leading:
        found = _only(leading, choices)
    else:
        lines = [line.strip() for line in plain.splitlines()]
        ends = [_BARE_LETTER.fullmatch(line) for line in (*lines[:1], *lines[-1:])]
        stated = [_only(match, choices) for match in _STATED_LETTER.finditer(plain)]
        if [] in stated:
            return None
        found = [letter for letters in stated for letter in letters]
        found += [match[1] for match in ends if match and match[1].isupper()]
        found += [known[i] for i, choice in enumerate(choices) if _plain(choice) in (_plain(plain), _plain(text))]
        both = _LETTER_AND_TEXT.fullmatch(plain)
        at = known.find(both[1].upper()) if both else -1
        if both and at >= 0 and _plain(choices[at]) == _plain(both[2]):
            found.append(known[at])
        found = found or [match[1] for match in _EMPHASISED_LETTER.findall(styled)]
    different = {letter.upper() for letter in found}
    return different.pop() if len(different) == 1 and next(iter(different)) in known else None


def _only(match: re.Match[str], choices: Sequence[str]) -> list[str]:
    """The letter of a match; none where another one is named with it ("A or B", "A. red or B. blue").

    An article ("B, A dog"), "I" and a letter that something is said about ("A, and B is wrong") are no second letter.
    """
    letter, at = (match[1], 1) if match[1] else (match[2], 2)
    number, text = LETTERS.find(letter.upper()), match.string
    own = re.escape(choices[number]) if 0 <= number < len(choices) else ""
    another = re.compile(
        rf"[\s.:,()\[\]\"'-]*(?i:{own})?[\s,()\[\]\"']*{_JOINED}\s*(?:option\s+|answer\s+)?[(\[\"']*"
        rf"(?![AI]\s+(?!or\b|and\b)[a-z])(?!{letter.upper()})[A-Z]\b(?!'|\s+(?:is|was|does|has)\b)"
    )
    several = another.match(text, match.end(at)) or _BEFORE.search(text, 0, match.start(at))
    return [] if several else [letter]


_VSTAR_CASCADE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:^|\s)([A-D])(?:\s|$)",
    )
)


def chosen_letter_vstar(prediction: str) -> str | None:
    """V* as lmms-eval reads it: the first of several patterns, so that "Blue" is B and any lone letter may count."""
    text = prediction.strip().upper()
    for pattern in _VSTAR_CASCADE:
        found = pattern.search(text)
        if found:
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None


_MME_OPENINGS = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:"),
)


def chosen_letter_mme(prediction: str) -> str:
    """MME-RealWorld as lmms-eval reads it: the first capital A to E after the usual openings are cut out."""
    text = prediction.strip()
    for opening in _MME_OPENINGS:
        text = text.replace(opening, "")
    found = re.search("[A-E]", text)
    if found:
        return found[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in "ABCDE" if text.lower() in f"({letter.lower()})"), "")


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def chosen_letter_hrbench(prediction: str, choices: Sequence[str]) -> str | None:
    """HR-Bench as lmms-eval reads it before it would ask a judge: one option letter among the words, else one option
    whose text stands in the answer; None where its rules do not decide, which counts as wrong here.
    """
    text = prediction.strip()
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = set(text.translate(dict.fromkeys(map(ord, ".()[],:;!*#{}"), " ")).split())
        named = [letter for letter in LETTERS[: len(choices)] if letter in words]
        if len(named) == 1:
            return named[0]
        if not named and "Z" in words:
            return "Z"
    held = [LETTERS[i] for i, choice in enumerate(choices) if choice.lower() in text.lower()]
    return held[0] if len(held) == 1 else None
