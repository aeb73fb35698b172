"""Step difficulty: how often the student is right on exactly the picture it would be trained on.

A question that the student always gets right teaches nothing, and one that it never gets right is often wrong itself,
so only a band between is kept. What failed is neither right nor wrong; too few answers refuse the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qzoom.config import check_choice, check_count, check_range
from qzoom.data import overlay
from qzoom.distill.items import Difficulty, Item, Views, Vote, choice_text
from qzoom.distill.roles import Reader, asked_of, region_of, with_model
from qzoom.errors import CallRefusedError, ConfigError, DataError
from qzoom.scoring.agree import same
from qzoom.scoring.judge import Judge
from qzoom.scoring.letters import chosen_letter

__all__ = ["DifficultySettings", "DifficultyStep"]


@dataclasses.dataclass(frozen=True, slots=True)
class DifficultySettings:
    """Which questions are worth training on.

    Args:
        samples: answers of the student.
        low: smallest share of right answers.
        high: largest share.
        least: answers that must arrive; 0 means all.
        view: how the box is marked, as in training; "none" shows the plain picture.
        clause: whether the question says what is marked, as in training.
        tokens: visual tokens of the training view, which the width of lines follows; 0 takes the overlay's own number.
        negatives: whether negatives have to lie in the band too.

    Raises:
        ConfigError: a value out of range, or an empty band.
    """

    samples: int = 4
    low: float = 0.25
    high: float = 0.75
    least: int = 0
    view: overlay.Style = "rectangle"
    clause: bool = True
    tokens: int = 0
    negatives: bool = False

    def __post_init__(self) -> None:
        check_count(self, "samples", 1, 1000)
        check_count(self, "least", 0, self.samples)
        check_range(self, "low", 0.0, 1.0)
        check_range(self, "high", self.low, 1.0)
        check_choice(self, "view", overlay.STYLES)
        check_count(self, "tokens", 0, 10**6)
        for name in ("clause", "negatives"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"difficulty: {name} must be true or false, not {getattr(self, name)!r}.")


@dataclasses.dataclass(frozen=True, slots=True)
class DifficultyStep:
    """Measures and decides.

    Args:
        student: who is asked.
        views: what it may look at.
        settings: the band.
        judge: says whether a free answer means the right one where rules cannot; without it only equal ones do.
    """

    student: Reader
    views: Views
    settings: DifficultySettings = dataclasses.field(default_factory=DifficultySettings)
    judge: Judge | None = None
    name: str = "difficulty"

    def __call__(self, item: Item) -> Sequence[Item]:
        """The item with its pass rate and the decision."""
        if item.answer is None:
            raise DataError("This item has no answer; run the step vote first.")
        settings, asked, box = self.settings, asked_of(item), region_of(item).box
        whole = self.views.whole(item)
        image = overlay.draw(whole, box, settings.view, tokens=settings.tokens or None)
        text = asked.text if item.choices is None else choice_text(asked.text, item.choices.options)
        hint = overlay.clause(settings.view, box, whole.size) if settings.clause else ""
        text = f"{text}\n{hint}" if hint else text
        votes = [self.student.read(item, image, text, sample) for sample in range(settings.samples)]
        received = [vote for vote in votes if vote.status != "failed"]
        passes = sum(self._right(item, vote) for vote in received)
        item = with_model(item, "student", self.student.model)
        measured = Difficulty(passes, len(received), self.student.name, settings.view)
        reason = "" if asked.negative and not settings.negatives else self._reason(passes, len(received))
        return (dataclasses.replace(item, difficulty=measured).decide(self.name, not reason, reason),)

    def _reason(self, passes: int, received: int) -> str:
        if received < (self.settings.least or self.settings.samples):
            return "too few answers of the student"
        share = passes / received if received else 0.0
        if share < self.settings.low:
            return "too hard for the student"
        return "too easy for the student" if share > self.settings.high else ""

    def _right(self, item: Item, vote: Vote) -> bool:
        if vote.status != "answered" or item.answer is None:
            return False
        if item.choices is not None:
            return chosen_letter(vote.text, item.choices.options) == item.choices.letter
        decided = same(vote.text, item.answer.text)
        if decided is None and self.judge is not None:
            try:
                decided = self.judge.same(asked_of(item).text, vote.text, item.answer.text)
            except CallRefusedError:
                decided = None
        return decided is True
