"""Rewards: extract the answer from a reply, then score it by rule, and free text by a judge.

The answer is the text of the last answer tag. Only a closed tag counts, in upper or lower case and over several lines.
A reply without tags is an answer only if it is short, and only for models that answer without tags.

A reply that cannot be scored (the judge failed) has no reward: None leaves it out of its group's mean and without a
gradient. It is never 0, which would train against an answer that may be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qzoom.scoring.agree import decide_exact, exact_match, normalise
from qzoom.scoring.judge import JudgeFailure
from qzoom.scoring.letters import chosen_letter
from qzoom.training.student.data import ExportedQuestion

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)


def answer_of(reply: str, form: str = "plain", longest_plain: int = 300) -> str | None:
    """The answer in a reply; None where there is none.

    The form "tags" demands a tag; "plain" also takes a reply of at most `longest_plain` characters as a whole.
    """
    found = _TAG.findall(reply)
    if found:
        return str(found[-1]).strip() or None
    text = reply.strip()
    if form == "tags" or not text or len(text) > longest_plain or "<answer>" in text.lower():
        return None
    return text


def well_formed(reply: str, form: str = "plain", longest_plain: int = 300) -> bool:
    """Whether a reply has the demanded form: with tags exactly one answer, and nothing after it."""
    if form == "plain":
        return answer_of(reply, form, longest_plain) is not None
    tags = _TAG.findall(reply)
    return len(tags) == 1 and bool(str(tags[0]).strip()) and reply.rstrip().lower().endswith("</answer>")


def wrap(answer: str, form: str = "plain") -> str:
    """The reply that gives an answer in a form."""
    return f"<answer>{answer}</answer>" if form == "tags" else answer


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?%?")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

JudgeCall = Callable[[str, Sequence[str], str], bool]
"""Question, right answers and given answer to a verdict; raises `JudgeFailure` without one."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reply's reward."""

    accuracy: float | None  # 0 to 1; None when it could not be judged
    form: float  # 1 for a well-formed reply, else 0
    by: str  # "empty", "letter", "number", "rule", "judge", "unjudged" or "failed"


def accuracy(
    reply: str,
    target: ExportedQuestion,
    *,
    form: str = "plain",
    longest_plain: int = 300,
    counting: bool = False,
    judge: JudgeCall | None = None,
) -> Reward:
    """The reward of a reply to a question; `form` and `longest_plain` as in `answer_of`.

    With `counting`, numbers of counting questions are rewarded by relative error. Without a judge, answers that rules
    cannot decide are wrong.
    """
    fine = 1.0 if well_formed(reply, form, longest_plain) else 0.0
    answer = answer_of(reply, form, longest_plain)
    if answer is None:
        return Reward(0.0, fine, "empty")
    if target.choices:
        return Reward(float(chosen_letter(answer, target.choices) == target.letter), fine, "letter")
    said, known = number_of(answer), number_of(target.answer)
    if known is not None:
        if counting and target.kind == "counting":
            return Reward(counting_reward(said, known), fine, "number")
        same = exact_match(answer, target.answer) or (said is not None and said == known)
        if same or said is not None or judge is None:
            return Reward(1.0 if same else 0.0, fine, "number")
    return _free(answer, target, fine, judge)


def counting_reward(said: float | None, known: float) -> float:
    """How near a number is: 1 minus the relative error, at least 0; where nothing is to be counted the exponential of
    minus the error."""
    if said is None:
        return 0.0
    error = abs(said - known)
    return math.exp(-error) if known == 0 else max(0.0, 1.0 - error / abs(known))


def number_of(text: str) -> float | None:
    """The number that a text is: digits (with thousands commas, decimals, a sign, a per cent sign) or a number word up
    to twelve; None for anything else."""
    plain = text.strip().rstrip(".").strip().lower()
    if plain in _WORDS:
        return float(_WORDS.index(plain))
    if not plain or not any(c.isdigit() for c in plain) or not _NUMBER.fullmatch(plain):
        return None
    return float(plain.replace(",", "").rstrip("%"))


def combine(reward: Reward, format_weight: float) -> float | None:
    """One figure of both; None stays None."""
    if reward.accuracy is None:
        return None
    return (1.0 - format_weight) * reward.accuracy + format_weight * reward.form


def _free(answer: str, target: ExportedQuestion, fine: float, judge: JudgeCall | None) -> Reward:
    """The reward of a free answer by exact rules, or by the judge where they cannot tell."""
    same = normalise(answer).rstrip(".") == normalise(target.answer).rstrip(".")
    verdict = True if same else decide_exact(answer, [target.answer])
    if verdict is not None:
        return Reward(float(verdict), fine, "rule")
    if judge is None:
        return Reward(0.0, fine, "unjudged")
    try:
        return Reward(float(judge(target.text, [target.answer], answer)), fine, "judge")
    except JudgeFailure:
        return Reward(None, fine, "failed")
