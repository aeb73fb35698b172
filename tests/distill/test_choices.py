"""Options, the check without a picture, and paired negatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from qzoom.distill.by_rule import RuleMaker, RuleReader
from qzoom.distill.choices import ChoicesSettings, ChoicesStep
from qzoom.distill.items import NONE_OPTION, Agreement, Item, Vote
from qzoom.errors import CallRefusedError, ConfigError, DataError
from qzoom.scoring.agree import normal
from qzoom.scoring.letters import LETTERS
from tests.distill.views import ITEM, StillViews

VIEWS = StillViews()
ANSWERED = dataclasses.replace(ITEM, answer=Agreement("A4", 6, 8, (("a", 3), ("b", 3))), votes=(Vote("a", 0, "A4"),))
PLAIN = ChoicesSettings(none_share=0.0, negatives=0.0)


class Maker:
    """Offers what it is told."""

    name = "maker"
    model = "maker@1"

    def __init__(self, *texts: str, refuses: bool = False) -> None:
        self.texts = texts
        self.refuses = refuses

    def distractors(self, item: Item, views: Any, count: int) -> Sequence[str]:
        if self.refuses:
            raise CallRefusedError("HTTP 413")
        return self.texts


class Judge:
    name = "judge"
    model = "judge@1"

    def same(self, question: str, first: str, second: str) -> bool | None:
        return {first, second} == {"dark red", "maroon"}


def answered(text: str) -> Item:
    return dataclasses.replace(ANSWERED, answer=Agreement(text, 6, 8, ()))


def right_option(item: Item) -> str:
    assert item.choices is not None
    return item.choices.options[LETTERS.index(item.choices.letter)]


def test_options_are_distinct_and_the_letter_is_the_right_one() -> None:
    offered = ("a4", "A4.", " B7 ", "b7", "", "C 9", "D1", "E5")
    (item,) = ChoicesStep(Maker(*offered), VIEWS, PLAIN)(ANSWERED)
    assert item.choices is not None
    assert sorted(item.choices.options) == ["A4", "B7", "C 9", "D1"]
    assert right_option(item) == "A4"
    assert item.choices.maker == "maker"
    assert ("maker", "maker@1") in item.models


def test_the_order_comes_from_the_item_and_every_letter_comes_up() -> None:
    step = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, PLAIN)
    assert step(ANSWERED) == step(ANSWERED)
    letters = {step(dataclasses.replace(ANSWERED, seed=seed))[0].choices.letter for seed in range(40)}
    assert letters == set("ABCD")


def test_options_that_may_mean_the_same_are_left_out() -> None:
    offered = ("maroon", "red", "blue", "green", "grey")
    (alone,) = ChoicesStep(Maker(*offered), VIEWS, PLAIN)(answered("dark red"))
    assert set(alone.choices.options) == {"dark red", "maroon", "blue", "green"}  # "dark red" holds "red"
    (judged,) = ChoicesStep(Maker(*offered), VIEWS, PLAIN, judge=Judge())(answered("dark red"))
    assert set(judged.choices.options) == {"dark red", "red", "blue", "green"}


@pytest.mark.parametrize(
    ("maker", "reason"),
    [
        (Maker("A4", "a4", "B7"), "too few distinct options"),
        (Maker(refuses=True), "the maker of options refused the picture"),
    ],
)
def test_without_enough_options_a_question_stays_open_or_goes(maker: Maker, reason: str) -> None:
    (kept,) = ChoicesStep(maker, VIEWS, PLAIN)(ANSWERED)
    assert (kept.choices, kept.kept, kept.decisions[-1].reason) == (None, True, reason)
    (gone,) = ChoicesStep(maker, VIEWS, dataclasses.replace(PLAIN, required=True))(ANSWERED)
    assert (gone.kept, gone.decisions[-1].reason) == (False, reason)


def test_yes_and_left_have_two_options() -> None:
    for right, other in (("yes", "no"), ("Left", "Right")):
        (item,) = ChoicesStep(RuleMaker(), VIEWS, PLAIN)(answered(right))
        assert set(item.choices.options) == {right, other}


def test_options_by_rule_do_not_stand_in_the_crop() -> None:
    for seed in range(30):
        (item,) = ChoicesStep(RuleMaker(), VIEWS, PLAIN)(dataclasses.replace(ANSWERED, seed=seed))
        forms = {normal(option) for option in item.choices.options}
        assert len(forms) == 4
        assert "b9" not in forms  # printed in the crop
        assert "c7" in forms  # printed elsewhere


def test_names_are_not_mixed_with_whatever_is_printed() -> None:
    company = dataclasses.replace(ANSWERED, asked=dataclasses.replace(ITEM.asked, text="Which company is it?"))
    company = dataclasses.replace(company, answer=Agreement("LIM MOTOR SDN BHD", 6, 8, ()))
    (item,) = ChoicesStep(RuleMaker(), VIEWS, PLAIN)(company)
    assert len(item.choices.options) == 4
    assert not {"A4", "C7", "THANK YOU"} & set(item.choices.options)


class Guesser:
    """Picks an option by its text, or fails."""

    name = "guesser"
    model = "guesser@1"

    def __init__(self, *picks: str) -> None:
        self.picks = picks
        self.texts: list[str] = []

    def read(self, item: Item, image: Any, text: str, sample: int) -> Vote:
        assert image is None
        self.texts.append(text)
        pick = self.picks[sample % len(self.picks)]
        if pick == "!":
            return Vote(self.name, sample, "", "failed", "HTTP 500")
        line = next(line for line in text.split("\n") if line.endswith(f". {pick}"))
        return Vote(self.name, sample, line[0])


def guessed(*picks: str, guesses: int = 6) -> tuple[Item, Guesser]:
    guesser = Guesser(*picks)
    settings = dataclasses.replace(PLAIN, guesses=guesses)
    (item,) = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, settings, guesser)(ANSWERED)
    return item, guesser


def test_what_is_solved_without_the_picture_goes() -> None:
    item, guesser = guessed("A4")
    assert item.decisions[-1].reason == "solved without the picture"
    assert len(set(guesser.texts)) > 1  # the options are shuffled anew
    assert guesser.texts[0].startswith(ANSWERED.asked.text + "\nA. ")


@pytest.mark.parametrize("picks", [("A4", "B7", "C9"), ("B7",), ("!",), ("A4", "!", "!", "!", "!", "!")])
def test_what_chance_or_failures_explain_stays(picks: tuple[str, ...]) -> None:
    assert guessed(*picks)[0].kept


def test_positives_list_none_of_these_now_and_then_and_never_as_right() -> None:
    settings = dataclasses.replace(PLAIN, none_share=0.5)
    items = [
        ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, settings)(dataclasses.replace(ANSWERED, seed=seed))[0]
        for seed in range(100)
    ]
    listed = [item for item in items if NONE_OPTION in item.choices.options]
    assert 30 <= len(listed) <= 70
    assert all(len(item.choices.options) == 4 and right_option(item) == "A4" for item in items)


def test_a_missing_option_is_a_paired_negative() -> None:
    settings = ChoicesSettings(none_share=0.0, negatives=1.0, negative_kinds=("missing",))
    positive, negative = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, settings)(ANSWERED)
    assert (positive.asked.negative, positive.asked.pair) == (False, "")
    assert (negative.asked.negative, negative.asked.pair) == (True, positive.id)
    assert negative.asked.text == positive.asked.text
    assert negative.id != positive.id
    assert set(negative.choices.options) == {"B7", "C9", "D1", NONE_OPTION}
    assert right_option(negative) == NONE_OPTION
    assert (negative.answer.text, negative.answer.by, negative.votes) == (NONE_OPTION, "rule", ())
    assert negative.kept
    assert negative.region == positive.region


def test_an_absent_thing_is_a_paired_negative() -> None:
    settings = ChoicesSettings(none_share=0.0, negatives=1.0, negative_kinds=("absent",))
    positive, negative = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, settings)(ANSWERED)
    assert negative.asked.pair == positive.id
    assert negative.asked.negative
    assert negative.asked.text.startswith("What is the code on the ")
    assert "red star" not in negative.asked.text
    assert "blue cross" not in negative.asked.text
    assert negative.answer.text == "none"
    assert len(negative.choices.options) == 4
    assert right_option(negative) == NONE_OPTION
    open_form = ChoicesStep(None, VIEWS, settings)(ANSWERED)
    assert [item.choices for item in open_form] == [None, None]
    assert open_form[1].answer.text == "none"


def test_the_share_of_negatives_holds() -> None:
    settings = ChoicesSettings(negatives=0.3)
    step = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, settings)
    made = [step(dataclasses.replace(ANSWERED, seed=seed)) for seed in range(200)]
    negatives = [items[1] for items in made if len(items) == 2]
    assert 40 <= len(negatives) <= 80
    missing = sum(item.answer.text == NONE_OPTION for item in negatives)
    assert 0.25 <= missing / len(negatives) <= 0.75
    assert all(len(item.choices.options) == 4 for item in negatives)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="can never be told from chance"):
        ChoicesSettings(guesses=2)
    with pytest.raises(ConfigError, match="may list absent and missing"):
        ChoicesSettings(negative_kinds=("gone",))
    with pytest.raises(ConfigError, match="options"):
        ChoicesSettings(options=1)
    with pytest.raises(ConfigError, match="required must be"):
        ChoicesSettings(required=1)
    with pytest.raises(DataError, match="run the step vote first"):
        ChoicesStep(None, VIEWS)(ITEM)


def test_a_student_by_rule_names_the_letter() -> None:
    (item,) = ChoicesStep(Maker("B7", "C9", "D1"), VIEWS, PLAIN)(ANSWERED)
    assert RuleReader().read(item, None, "", 0).text == item.choices.letter
    assert RuleReader().read(ANSWERED, None, "", 0).text == "A4"
