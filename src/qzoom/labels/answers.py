"""When two short answers count as the same: the comparison that stage 3 labels rest on (method.md 8.1)."""

from __future__ import annotations

import string

__all__ = ["answers_match", "lowered", "normalise_answer"]

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
