"""Step choices: options for a question, checked and shuffled, and the negatives that belong to it.

"none of these" is the right option of a negative and now and then a wrong option of a positive, so that its presence
gives nothing away. One kind of negative asks about something absent: what the question names (a red star, an item, a
label) gives way to a thing that the image is known not to have. The other kind removes the right option.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.texts import COLOURS, SHAPES
from qzoom.distill.items import (
    NONE_OPTION,
    Agreement,
    Choices,
    Item,
    Known,
    KnownQuestion,
    QuestionDraft,
    choice_text,
    draft_of,
    with_model,
)
from qzoom.distill.pictures import Views
from qzoom.distill.roles import DistractorWriter, Reader
from qzoom.distill.vote import same_answer
from qzoom.errors import CallRefusedError, ConfigError, DataError
from qzoom.scoring.agree import mentions, normal
from qzoom.scoring.judge import Judge
from qzoom.scoring.letters import LETTERS, chosen_letter
from qzoom.settings import Between, Share, settings

NONE_ANSWER = "none"
_TRIES = 50


def absent(item: Item, known: Known) -> Item | None:
    """The negative of a positive item: its question about something that the picture does not have.

    It has the same region and is answered by rule; None when the question names nothing that can be exchanged.
    """
    draft = draft_of(item)
    rng = random.Random(f"{item.seed}/{item.id}/absent")
    question = next((q for q in known.questions if q.text == draft.text), None)
    field = "" if question is None else question.field
    text = _other_object(draft.text, field, known, rng) or _other_name(draft.text, field, known, rng)
    if not text or any(q.text == text for q in known.questions):
        return None
    answer = _answer(field, question)
    return dataclasses.replace(
        item,
        draft=QuestionDraft(text, draft.kind, "rule", True, item.id, answer),
        votes=(),
        answer=Agreement(answer, 0, 0, (), "rule"),
        choices=None,
        difficulty=None,
    )


def _answer(field: str, question: KnownQuestion | None) -> str:
    if field == "count":
        return "0"
    closed = question is not None and normal(question.answer) in ("yes", "no")
    return "no" if closed else NONE_ANSWER


def _other_object(text: str, field: str, known: Known, rng: random.Random) -> str:
    """Another colour and shape, or for counts another shape, that no object has."""
    if not known.objects or field == "side":
        return ""
    if field == "count":
        shape = next((s for s in SHAPES if mentions(text, _plural(s))), "")
        free = [s for s in SHAPES if all(thing.shape != s for thing in known.objects)]
        return text.replace(_plural(shape), _plural(rng.choice(free))) if shape and free else ""
    there = {(thing.colour, thing.shape) for thing in known.objects}
    named = next((f"{colour} {shape}" for colour, shape in sorted(there) if mentions(text, f"{colour} {shape}")), "")
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    return text.replace(named, " ".join(rng.choice(pairs))) if named and pairs else ""


def _other_name(text: str, field: str, known: Known, rng: random.Random) -> str:
    """Another item for a price or cell, another label for a labelled value, that is printed nowhere."""
    printed = [text for text, _ in known.texts]
    if field == "value":
        labels = [label.casefold() for label in texts.LABELS]
        name = max((label for label in labels if mentions(text, label)), key=len, default="")
        free = [label for label in labels if not _held(label, printed)]
        return text.replace(name, rng.choice(free)) if name and free else ""
    if field not in ("price", "cell"):
        return ""
    name = max((line for line in printed if len(line) > 2 and mentions(text, line)), key=len, default="")
    if not name or name not in text:
        return ""
    numbers = np.random.default_rng(rng.getrandbits(63))
    for _ in range(_TRIES):
        other = texts.item_name(numbers)
        if not _held(other, printed):
            return text.replace(name, other)
    return ""


def _held(name: str, printed: Sequence[str]) -> bool:
    return any(name.casefold() in line.casefold() for line in printed)


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


_PAIRS = (("yes", "no"), ("left", "right"))


@settings
class ChoicesSettings:
    """Options and negatives of an answered question."""

    options: Annotated[int, Between(2, 10)] = 4
    """Options of each question, the right one among them; answers like yes or left have two."""
    required: bool = False
    """Refuse a question without enough options instead of leaving it open."""
    none_share: Share = 0.25
    """Share of positives that list "none of these" as a wrong option."""
    negatives: Share = 0.25
    """Share of positives that get a paired negative."""
    negative_kinds: tuple[Literal["absent", "missing"], ...] = ("absent", "missing")
    """"absent" asks about something that is not there, where that is known; "missing" removes the right option, and
    has no open form."""
    guesses: Annotated[int, Between(0, 1000)] = 0
    """Answers of the guesser without the image, each with the options shuffled anew; 0 for none."""
    chance: Share = 0.05
    """A question is dropped when blind guessing gives so many right guesses with at most this probability."""

    def __post_init__(self) -> None:
        if self.guesses and self.options**-self.guesses > self.chance:
            raise ConfigError(
                f"{self.guesses} guesses among {self.options} options can never be told from chance at "
                f"{self.chance:g}; ask for more guesses or raise chance."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ChoicesStep:
    """The step: gives questions their options and their negatives."""

    writer: DistractorWriter | None  # writes wrong options; None leaves all questions open
    views: Views  # images for the writer
    settings: ChoicesSettings = dataclasses.field(default_factory=ChoicesSettings)  # of the step
    guesser: Reader | None = None  # answers without the image
    judge: Judge | None = None  # says whether an option means the same as the right answer where rules cannot

    def __call__(self, item: Item) -> Sequence[Item]:
        """The item, and after it its negative if it gets one."""
        if item.answer is None:
            raise DataError("This item has no answer; run the step vote first.")
        right = " ".join(item.answer.text.split())
        wanted = 1 if any(normal(right) in pair for pair in _PAIRS) else self.settings.options - 1
        item, wrong, reason = self._wrong_options(item, right, wanted)
        if self.writer is not None and not reason:
            with_none = wanted > 1 and self._drawn(item, "none") < self.settings.none_share
            shown = [*wrong[: wanted - with_none], *[NONE_OPTION] * with_none]
            item = _shuffled(item, right, shown, self.writer.name)
        if reason and self.settings.required:
            return (item.decide("choices", reason),)
        if item.choices is not None and self._guessed(item):
            return (item.decide("choices", "solved without the picture"),)
        negative = self._negative(item, wrong[:wanted])
        out = [item.decide("choices", note=reason)]
        if negative is not None:
            out.append(with_model(negative, "negatives", "rule").decide("choices"))
        return out

    def _wrong_options(self, item: Item, right: str, count: int) -> tuple[Item, list[str], str]:
        """The item with the writer in `models`; at least `count` wrong options, or none and the reason."""
        if self.writer is None:
            return item, [], ""
        item = with_model(item, "distractor_writer", self.writer.model)
        try:
            offered = self.writer.call(item, self.views, count + 2)
        except CallRefusedError:
            return item, [], "the distractor writer refused the picture"
        wrong = distinct_options(right, offered, lambda one, other: self._alike(item, one, other))
        return (item, [], "too few distinct options") if len(wrong) < count else (item, wrong, "")

    def _alike(self, item: Item, first: str, second: str) -> bool:
        """Whether two options may mean the same: by rule, by the judge, else when one holds the other."""
        decided = same_answer(draft_of(item).text, first, second, self.judge)
        return (mentions(first, second) or mentions(second, first)) if decided is None else decided

    def _guessed(self, item: Item) -> bool:
        """Whether the guesser is right more often than chance allows. Failures do not count at all."""
        if self.guesser is None or item.choices is None or not self.settings.guesses:
            return False
        right = item.choices.options[LETTERS.index(item.choices.letter)]
        hits = count = 0
        for sample in range(self.settings.guesses):
            options = list(item.choices.options)
            random.Random(f"{item.seed}/{item.id}/guess/{sample}").shuffle(options)
            vote = self.guesser.call(item, None, choice_text(draft_of(item).text, options), sample)
            if vote.status == "failed":
                continue
            letter = chosen_letter(vote.text, options)
            count += 1
            hits += letter is not None and options[LETTERS.index(letter)] == right
        return hits > 0 and _tail(hits, count, 1 / len(item.choices.options)) <= self.settings.chance

    def _negative(self, item: Item, wrong: Sequence[str]) -> Item | None:
        """The paired negative: an absent thing or a missing option, as drawn and as far as possible. It lists as many
        options as its positive."""
        if self._drawn(item, "negative") >= self.settings.negatives:
            return None
        kinds = self.settings.negative_kinds
        other = absent(item, self.views.known(item)) if "absent" in kinds else None
        if other is not None and draft_of(other).known == NONE_ANSWER and len(wrong) > 1 and item.choices is not None:
            other = _shuffled(other, NONE_OPTION, wrong, item.choices.writer)
        missing = self._without_right(item, wrong) if "missing" in kinds else None
        both = [one for one in (other, missing) if one is not None]
        return both[int(self._drawn(item, "kind") * len(both))] if both else None

    def _without_right(self, item: Item, wrong: Sequence[str]) -> Item | None:
        """The same question without its right option."""
        if item.choices is None or len(wrong) < 2:
            return None
        draft = draft_of(item)
        negative = dataclasses.replace(
            item,
            draft=QuestionDraft(draft.text, draft.kind, draft.writer, True, item.id, NONE_OPTION),
            votes=(),
            answer=Agreement(NONE_OPTION, 0, 0, (), "rule"),
        )
        return _shuffled(negative, NONE_OPTION, wrong, item.choices.writer)

    def _drawn(self, item: Item, what: str) -> float:
        return random.Random(f"{item.seed}/{item.id}/{what}").random()


def distinct_options(right: str, offered: Sequence[str], alike: Callable[[str, str], bool]) -> list[str]:
    """The offered texts, best first, without those that may mean the same as the right answer or as an earlier one."""
    out: list[str] = []
    for text in offered:
        text = " ".join(text.split())
        if normal(text) and not any(alike(text, other) for other in (right, *out)):
            out.append(text)
    return out


def _shuffled(item: Item, right: str, wrong: Sequence[str], writer: str) -> Item:
    options = [right, *wrong]
    random.Random(f"{item.seed}/{item.id}/order").shuffle(options)
    return dataclasses.replace(item, choices=Choices(tuple(options), LETTERS[options.index(right)], writer))


def _tail(hits: int, count: int, chance: float) -> float:
    """Chance of at least so many hits in blind guessing."""
    return sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits, count + 1))
