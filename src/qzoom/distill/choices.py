"""Questions about what is not there, each paired with the question about what is.

A question names a thing (a red star, an item, a label); with another thing in its place that the picture is known not
to have, its right answer is "none", "no" or "0". Only pictures whose contents are known have such negatives; the other
kind, choices without the right option, needs no knowledge (`qzoom.distill.choices`).

Step choices: options for a question, checked and shuffled, and the negatives that belong to it.

Options differ, none of them says the same as the right one, and where a guesser is named the right one must not be
found without the picture. "none of these" is the right option of a negative and, now and then, a wrong one of a
positive, so that its presence gives nothing away.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

from qzoom.config import check_count, check_range
from qzoom.distill.items import NONE_OPTION, Agreement, Asked, Choices, Item, Known, KnownQuestion, Views, choice_text
from qzoom.distill.roles import Maker, Reader, asked_of, with_model
from qzoom.errors import CallRefusedError, ConfigError, DataError
from qzoom.scoring.agree import mentions, normal, same
from qzoom.scoring.judge import Judge
from qzoom.scoring.letters import LETTERS, chosen_letter

__all__ = ["NONE_ANSWER", "ChoicesSettings", "ChoicesStep", "absent", "distinct_options"]


NONE_ANSWER = "none"
_TRIES = 50


def absent(item: Item, known: Known) -> Item | None:
    """The negative of an item: its question about something that the picture does not have.

    Args:
        item: a positive with its answer.
        known: about its picture.

    Returns:
        The item with the same region, answered by rule; None when the question names nothing that can be exchanged.
    """
    asked = asked_of(item)
    rng = random.Random(f"{item.seed}/{item.id}/absent")
    question = next((q for q in known.questions if q.text == asked.text), None)
    field = "" if question is None else question.field
    text = _other_object(asked.text, field, known, rng) or _other_name(asked.text, field, known, rng)
    if not text or any(q.text == text for q in known.questions):
        return None
    answer = _answer(field, question)
    return dataclasses.replace(
        item,
        asked=Asked(text, asked.kind, "rule", True, item.id, answer),
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
    from qzoom.data.synthetic.wording import COLOURS, SHAPES

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
    from qzoom.data.synthetic import texts

    printed = [line.text for line in known.texts]
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
    import numpy as np

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


@dataclasses.dataclass(frozen=True, slots=True)
class ChoicesSettings:
    """What is made of an answered question.

    Args:
        options: of each question, the right one among them; answers like yes or left have two.
        required: refuse a question without enough options, rather than leave it open.
        none_share: share of positives that list "none of these" as a wrong option.
        negatives: share of positives that get a paired negative.
        negative_kinds: "absent" asks about something that is not there, where that is known; "missing" takes the right
            option out, and has no open form.
        guesses: answers of the guesser without the picture, each with the options shuffled anew; 0 asks for none.
        chance: a question is dropped when so many right guesses had at most this chance to come about blindly.

    Raises:
        ConfigError: a value out of range.
    """

    options: int = 4
    required: bool = False
    none_share: float = 0.25
    negatives: float = 0.25
    negative_kinds: tuple[str, ...] = ("absent", "missing")
    guesses: int = 0
    chance: float = 0.05

    def __post_init__(self) -> None:
        check_count(self, "options", 2, 10)
        check_count(self, "guesses", 0, 1000)
        for name in ("none_share", "negatives", "chance"):
            check_range(self, name, 0.0, 1.0)
        if not isinstance(self.negative_kinds, tuple) or set(self.negative_kinds) - {"absent", "missing"}:
            raise ConfigError(f"choices: negative_kinds may list absent and missing, not {self.negative_kinds!r}.")
        if not isinstance(self.required, bool):
            raise ConfigError(f"choices: required must be true or false, not {self.required!r}.")
        if self.guesses and self.options**-self.guesses > self.chance:
            raise ConfigError(
                f"choices: {self.guesses} guesses among {self.options} options can never be told from chance at "
                f"{self.chance:g}; ask for more guesses or raise chance."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ChoicesStep:
    """Gives questions their options and their negatives.

    Args:
        maker: writes wrong options; None leaves all questions open.
        views: what it may look at.
        settings: of the step.
        guesser: answers without the picture.
        judge: says whether an option means the same as the right answer where rules cannot.
    """

    maker: Maker | None
    views: Views
    settings: ChoicesSettings = dataclasses.field(default_factory=ChoicesSettings)
    guesser: Reader | None = None
    judge: Judge | None = None
    name: str = "choices"

    def __call__(self, item: Item) -> Sequence[Item]:
        """The item, and after it its negative if it gets one."""
        if item.answer is None:
            raise DataError("This item has no answer; run the step vote first.")
        right = " ".join(item.answer.text.split())
        wanted = 1 if any(normal(right) in pair for pair in _PAIRS) else self.settings.options - 1
        item, wrong, reason = self._wrong_options(item, right, wanted)
        if self.maker is not None and not reason:
            with_none = wanted > 1 and self._drawn(item, "none") < self.settings.none_share
            shown = [*wrong[: wanted - with_none], *[NONE_OPTION] * with_none]
            item = _shuffled(item, right, shown, self.maker.name)
        if reason and self.settings.required:
            return (item.decide(self.name, False, reason),)
        if item.choices is not None and self._guessed(item):
            return (item.decide(self.name, False, "solved without the picture"),)
        negative = self._negative(item, wrong[:wanted])
        out = [item.decide(self.name, True, reason)]
        if negative is not None:
            out.append(with_model(negative, "negatives", "rule").decide(self.name, True))
        return out

    def _wrong_options(self, item: Item, right: str, wanted: int) -> tuple[Item, list[str], str]:
        """The item with its maker noted, at least `wanted` wrong options, or none and why."""
        if self.maker is None:
            return item, [], ""
        item = with_model(item, "maker", self.maker.model)
        try:
            offered = self.maker.distractors(item, self.views, wanted + 2)
        except CallRefusedError:
            return item, [], "the maker of options refused the picture"
        wrong = distinct_options(right, offered, lambda one, other: self._alike(item, one, other))
        return (item, [], "too few distinct options") if len(wrong) < wanted else (item, wrong, "")

    def _alike(self, item: Item, first: str, second: str) -> bool:
        """Whether two options may mean the same: by rule, by the judge, else when one holds the other."""
        decided = same(first, second)
        if decided is None and self.judge is not None:
            try:
                decided = self.judge.same(asked_of(item).text, first, second)
            except CallRefusedError:
                decided = None
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
            vote = self.guesser.read(item, None, choice_text(asked_of(item).text, options), sample)
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
        if other is not None and asked_of(other).known == NONE_ANSWER and len(wrong) > 1 and item.choices is not None:
            other = _shuffled(other, NONE_OPTION, wrong, item.choices.maker)
        missing = self._without_right(item, wrong) if "missing" in kinds else None
        both = [one for one in (other, missing) if one is not None]
        return both[int(self._drawn(item, "kind") * len(both))] if both else None

    def _without_right(self, item: Item, wrong: Sequence[str]) -> Item | None:
        """The same question without its right option."""
        if item.choices is None or len(wrong) < 2:
            return None
        asked = asked_of(item)
        negative = dataclasses.replace(
            item,
            asked=Asked(asked.text, asked.kind, asked.asker, True, item.id, NONE_OPTION),
            votes=(),
            answer=Agreement(NONE_OPTION, 0, 0, (), "rule"),
        )
        return _shuffled(negative, NONE_OPTION, wrong, item.choices.maker)

    def _drawn(self, item: Item, what: str) -> float:
        return random.Random(f"{item.seed}/{item.id}/{what}").random()


def distinct_options(right: str, offered: Sequence[str], alike: Callable[[str, str], bool]) -> list[str]:
    """The offered texts without those that may mean the same as the right answer or as an earlier one.

    Args:
        right: the right answer.
        offered: best first.
        alike: (one, other) -> whether both may mean the same.
    """
    out: list[str] = []
    for text in offered:
        text = " ".join(text.split())
        if normal(text) and not any(alike(text, other) for other in (right, *out)):
            out.append(text)
    return out


def _shuffled(item: Item, right: str, wrong: Sequence[str], maker: str) -> Item:
    options = [right, *wrong]
    random.Random(f"{item.seed}/{item.id}/order").shuffle(options)
    return dataclasses.replace(item, choices=Choices(tuple(options), LETTERS[options.index(right)], maker))


def _tail(hits: int, count: int, chance: float) -> float:
    """Chance of at least so many hits in blind guessing."""
    return sum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits, count + 1))
