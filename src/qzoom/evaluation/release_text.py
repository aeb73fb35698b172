"""How the authors' release of ZoomBench reads an answer, and the rules for numbers that stand for it here.

The release takes a part of the reply, compares it with a maths grader, on some benchmarks by the first fitting capital
letter, and asks a language model where both fail. No model is asked here: what the rules do not decide is wrong.
"""

from __future__ import annotations

import re

__all__ = ["number_in", "release_letter", "release_part", "same_answer", "same_answer_release"]

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w]|[.,]\d)")
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_WORDS = _NAMES.split()
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)
_LETTERS = (re.compile(r"\(([A-Z])\)"), re.compile(r"([A-Z])[.)\s]"), re.compile(r"([A-Z])"))


def release_part(reply: str) -> str:
    """The part of a reply that the release looks at: the first answer tag, else from "Answer:" on, that word included,
    else the last three lines."""
    if "<answer>" in reply:
        opened = reply.index("<answer>") + len("<answer>")
        closed = reply.find("</answer>", opened)
        return reply[opened : closed if closed >= 0 else None]
    if "Answer:" in reply:
        return reply[reply.index("Answer:") :]
    return "\n".join(reply.split("\n")[-3:])


def release_letter(reply: str) -> str | None:
    """The option that the release's letter rule reads: a capital in round brackets, else one before a full stop, a
    bracket or a space, else the first capital. So "A red bus" is A and "Option C" is O."""
    part = release_part(reply)
    for pattern in _LETTERS:
        found = pattern.search(part)
        if found:
            return found[1]
    return None


def number_in(text: str) -> float | None:
    """The one number that a text names, in digits or as a word up to twenty; None for none or for different ones."""
    found = {float(number.replace(",", "")) for number in _NUMBER.findall(text)}
    found |= {float(_WORDS.index(word.lower())) for word in _WORD.findall(text)}
    return found.pop() if len(found) == 1 else None


def final_part(reply: str) -> str:
    """What stands in the last answer tag; the whole reply without one."""
    tags = _TAG.findall(reply)
    return tags[-1] if tags else reply


def same_answer(reply: str, answer: str) -> bool:
    """Whether a reply gives a short answer: the same text up to case and spaces, or, where the answer is a number, a
    reply that names that number and no other.

    Args:
        reply: what was answered; of several answer tags the last one counts.
        answer: the right answer.
    """
    said = final_part(reply)
    if _plain(said) == _plain(answer):
        return True
    wanted = number_in(answer) if _is_number(answer) else None
    return wanted is not None and number_in(said) == wanted


def same_answer_release(reply: str, answer: str) -> bool:
    """The same by the release's part of the reply and equality of texts or numbers, where it would go on to a model."""
    said = release_part(reply)
    if said.strip().lower() == answer.strip().lower():
        return True
    return _is_number(said) and _is_number(answer) and number_in(said) == number_in(answer)


def _is_number(text: str) -> bool:
    bare = text.strip().rstrip(".")
    return bool(_NUMBER.fullmatch(bare) or _WORD.fullmatch(bare))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
