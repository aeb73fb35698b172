"""Which option of a multiple-choice question an answer names: clearly, or as lmms-eval's tasks read it."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["LETTERS", "chosen_letter", "chosen_letter_hrbench", "chosen_letter_mme", "chosen_letter_vstar"]


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_BARE_LETTER = re.compile(r"[(\[]?([A-Z])[)\]]?[.:,;]?")
_LEADING_LETTER = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])(?:\s|$)")
_STATED_LETTER = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b(?!')", re.IGNORECASE)


def chosen_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the option that an answer clearly names; None where it names none or several.

    Clear are a letter alone, one that leads ("B. the red one"), one that is stated ("the answer is B"), and the whole
    text of one option.

    Args:
        prediction: what was answered.
        choices: the options' texts, A first.
    """
    text = prediction.strip()
    known = LETTERS[: len(choices)]
    bare = _BARE_LETTER.fullmatch(text.upper())
    leading = _LEADING_LETTER.match(text)
    if bare or leading:
        found = [bare[1] if bare else (leading[1] or leading[2] if leading else "")]
    else:
        found = [letter.upper() for letter in _STATED_LETTER.findall(text)]
        found += [known[i] for i, choice in enumerate(choices) if _same(choice, text)]
    different = set(found)
    return found[0] if len(different) == 1 and found[0] in known else None


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


_MME_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def chosen_letter_mme(prediction: str) -> str:
    """MME-RealWorld as lmms-eval reads it: the first capital A to E after the usual openings are cut out."""
    text = prediction.strip()
    for prefix in _MME_PREFIXES:
        text = text.replace(prefix, "")
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


def _same(first: str, second: str) -> bool:
    return " ".join(first.casefold().split()) == " ".join(second.casefold().split())
