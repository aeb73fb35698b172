"""Step difficulty: the student's pass rate on exactly the view it would be trained on.

A question that the student always answers teaches nothing, and one that it never answers is often wrong itself, so a
band between is kept. Failed calls are neither right nor wrong; too few answers refuse the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from qzoom.data import overlay
from qzoom.distill.items import Difficulty, Item, Step, Vote, choice_text, draft_of, target_of, with_model
from qzoom.distill.pictures import Views
from qzoom.distill.roles import Reader
from qzoom.distill.vote import same_answer
from qzoom.errors import ConfigError, DataError
from qzoom.scoring.judge import Judge
from qzoom.scoring.letters import chosen_letter
from qzoom.settings import Between, Share, settings


@settings
class DifficultySettings:
    """Which questions are kept, by the student's pass rate."""

    samples: Annotated[int, Between(1, 1000)] = 4
    """Answers of the student."""
    low: Share = 0.25
    """Smallest share of right answers."""
    high: Share = 0.75
    """Largest share of right answers."""
    least: Annotated[int, Between(0)] = 0
    """Answers that must arrive; 0 for all."""
    view: overlay.Style = "rectangle"
    """How the box is marked, as in training; "none" shows the plain image."""
    clause: bool = True
    """Whether the question says what is marked, as in training."""
    tokens: Annotated[int, Between(0, 10**6)] = 0
    """Visual tokens of the training view, which decide the line width; 0 takes the overlay's default."""
    negatives: bool = False
    """Whether negatives have to lie in the band too."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"low {self.low} is above high {self.high}; no question lies between.")
        if self.least > self.samples:
            raise ConfigError(f"least {self.least} is more than the {self.samples} samples.")


def difficulty_step(student: Reader, views: Views, settings: DifficultySettings, judge: Judge | None = None) -> Step:
    """Measures the student's pass rate and decides; without a judge only equal free answers count as right."""

    def run(item: Item) -> Sequence[Item]:
        if item.answer is None:
            raise DataError("This item has no answer; run the step vote first.")
        draft, box = draft_of(item), target_of(item).box
        whole = views.whole(item)
        image = overlay.draw(whole, box, settings.view, tokens=settings.tokens or None)
        text = draft.text if item.choices is None else choice_text(draft.text, item.choices.options)
        hint = overlay.clause(settings.view, box, whole.size) if settings.clause else ""
        text = f"{text}\n{hint}" if hint else text
        votes = [student.call(item, image, text, sample) for sample in range(settings.samples)]
        received = [vote for vote in votes if vote.status != "failed"]
        passes = sum(_is_right(item, vote, judge) for vote in received)
        item = with_model(item, "student", student.model)
        measured = Difficulty(passes, len(received), student.name, settings.view)
        reason = "" if draft.negative and not settings.negatives else _reason(passes, len(received), settings)
        return (dataclasses.replace(item, difficulty=measured).decide("difficulty", reason),)

    return run


def _reason(passes: int, received: int, settings: DifficultySettings) -> str:
    if received < (settings.least or settings.samples):
        return "too few answers of the student"
    share = passes / received if received else 0.0
    if share < settings.low:
        return "too hard for the student"
    return "too easy for the student" if share > settings.high else ""


def _is_right(item: Item, vote: Vote, judge: Judge | None) -> bool:
    if vote.status != "answered" or item.answer is None:
        return False
    if item.choices is not None:
        return chosen_letter(vote.text, item.choices.options) == item.choices.letter
    return same_answer(draft_of(item).text, vote.text, item.answer.text, judge) is True
