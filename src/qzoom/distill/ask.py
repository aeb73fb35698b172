"""Steps ask, validate and answer, and how an answer is read out of a teacher's reply.

The last `<answer>` tag counts, else the one value in LaTeX boxes, else a reply that is short enough to be an answer.
Markdown is removed. A reply that is not clearly an answer is a failure, and failures are never votes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qzoom.distill.by_rule import leak
from qzoom.distill.items import Item, Step, Vote, draft_of, with_model
from qzoom.distill.pictures import Views
from qzoom.distill.vote import VoteSettings, reachable
from qzoom.errors import CallRefusedError, ConfigError
from qzoom.scoring.agree import normal

if TYPE_CHECKING:
    from qzoom.distill.roles import QuestionWriter, Teacher, Validator

_SHORT = 200
_LONG = 1000
_ABSTENTIONS = (
    "cannot tell|can not tell|can't tell|cannot be determined|can't be determined|cannot determine|unanswerable|"
    "not answerable|unknown|not visible|illegible|unreadable|not readable|not sure|unsure|unclear|don't know|"
    "do not know|impossible to tell|not enough information|insufficient information"
)
_ABSTAINED = {
    normal(subject + phrase)
    for phrase in _ABSTENTIONS.split("|")
    for subject in ("", "i ", "we ", "it ", "this ", "it is ", "it's ", "i am ", "i'm ")
}
_OPENING = re.compile(r"(?:#{1,6} |> |[-*] )")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
_WRAPPED = re.compile(r"(?<![\w*_`$])(\*\*\*|\*\*|\*|___|__|_|```|`|\$\$|\$)(?=\S)([^\n]*?)(?<=\S)\1(?![\w*_`$])")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_STATED = re.compile(r"(?:the )?(?:final )?answer(?: is)?\s*:\s*", re.IGNORECASE)


def ask_step(writer: QuestionWriter, views: Views) -> Step:
    """One item for every question of the writer; a target without a question is refused."""

    def run(item: Item) -> Sequence[Item]:
        item = with_model(item, "question_writer", writer.model)
        try:
            drafts = writer.call(item, views)
        except CallRefusedError:
            return (item.decide("ask", "the question writer refused the picture"),)
        if not drafts:
            return (item.decide("ask", "no question about this place"),)
        return tuple(dataclasses.replace(item, draft=draft).decide("ask") for draft in drafts)

    return run


def validate_step(validator: Validator, views: Views) -> Step:
    """Keeps or refuses a question; leaks are found by rule before the validator is asked."""

    def run(item: Item) -> Sequence[Item]:
        draft = draft_of(item)
        reason = leak(draft.text, draft.known)
        if not reason:
            item = with_model(item, "validator", validator.model)
            try:
                reason = validator.call(item, views)
            except CallRefusedError:
                reason = "the validator refused the picture"
        return (item.decide("validate", reason),)

    return run


def answer_step(
    teachers: Sequence[Teacher],
    views: Views,
    samples: int = 4,
    wanted: VoteSettings | None = None,
    *,
    judged: bool = False,
) -> Step:
    """Asks every teacher several times about the crop; the vote decides about the answers.

    Args:
        teachers: who answer; their names differ.
        wanted: agreement that further samples must still be able to reach; None asks for every sample.
        judged: see `vote.reachable`.

    Raises:
        ConfigError: no teacher, two of one name, or no sample.
    """
    names = [teacher.name for teacher in teachers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"Teachers need names of their own, at least one; got: {', '.join(names) or 'none'}.")
    if samples < 1:
        raise ConfigError(f"samples must be a whole number from 1, not {samples!r}.")

    def run(item: Item) -> Sequence[Item]:
        draft_of(item)
        votes: list[Vote] = []
        worth = True
        left = dict.fromkeys(names, samples)
        for teacher in teachers:
            item = with_model(item, "teacher", teacher.model)
            for sample in range(samples):
                left[teacher.name] -= 1
                votes.append(
                    _vote(teacher, item, views, sample) if worth else Vote(teacher.name, sample, "", "skipped")
                )
                worth = worth and (wanted is None or reachable(votes, left, wanted, judged=judged))
        return (dataclasses.replace(item, votes=tuple(votes)),)

    return run


def _vote(teacher: Teacher, item: Item, views: Views, sample: int) -> Vote:
    try:
        return teacher.call(item, views, sample)
    except CallRefusedError as error:
        return Vote(teacher.name, sample, "", "failed", str(error))


def read_vote(teacher: str, sample: int, reply: str, *, cut_off: bool = False) -> Vote:
    """The vote in a teacher's reply; of one that was cut off at the token limit only a closed tag can be trusted."""

    def failed(reason: str) -> Vote:
        return Vote(teacher, sample, "", "failed", reason)

    text = _after_thought(reply)
    if text is None:
        return failed("the reply ends inside its thoughts")
    tagged = _last_tag(text)
    if tagged is None and cut_off:
        return failed("cut off at the token limit")
    boxed = _boxed_values(text if tagged is None else tagged)
    if len({normal(value) for value in boxed}) > 1:
        return failed("several boxed values")
    answer = boxed[-1] if boxed else text if tagged is None else tagged
    marked = tagged is not None or bool(boxed)
    if not marked and ("<answer>" in text or "\\boxed{" in text):
        return failed("an answer that is not closed")
    if len(answer) > _LONG:
        return failed("a long reply in place of an answer")
    answer = plain_text(answer)
    if not normal(answer):
        return failed("an empty answer")
    if not marked and (len(answer) > _SHORT or "\n" in answer):
        return failed("a long reply in place of an answer")
    if normal(answer) in _ABSTAINED:
        return Vote(teacher, sample, "", "abstained")
    return Vote(teacher, sample, answer)


def plain_text(text: str) -> str:
    """The text without Markdown and LaTeX wrapping and without "Answer:" in front."""
    text = _OPENING.sub("", text.strip(), count=1)
    text = _LATEX_TEXT.sub(r"\1", _LINK.sub(r"\1", text))
    for _ in range(3):
        text = _WRAPPED.sub(r"\2", text).strip()
    return _STATED.sub("", text, count=1).strip() if _STATED.match(text) else text


def _after_thought(reply: str) -> str | None:
    """What follows the last thought; None where a thought is not ended."""
    before, ended, after = reply.rpartition("</think>")
    rest = after if ended else before + after
    return None if "<think>" in rest else rest.strip()


def _last_tag(text: str) -> str | None:
    """What the last closed answer tag holds."""
    stop = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, stop) if stop >= 0 else -1
    if start < 0 or "<answer>" in text[stop:]:
        return None
    return text[start + len("<answer>") : stop].strip()


def _boxed_values(text: str) -> list[str]:
    """The contents of all closed LaTeX boxes, braces inside them balanced."""
    out = []
    start = text.find("\\boxed{")
    while start >= 0:
        first = start + len("\\boxed{")
        depth, stop = 1, first
        while stop < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[stop], 0)
            stop += 1
        if depth:
            break
        out.append(text[first : stop - 1].strip())
        start = text.find("\\boxed{", stop)
    return out
