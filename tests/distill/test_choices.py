import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from qzoom.data.synthetic.page import SceneObject
from qzoom.distill import by_rule
from qzoom.distill.choices import ChoicesSettings, ChoicesStep, absent
from qzoom.distill.items import NONE_OPTION, Agreement, Item, Known, KnownQuestion, QuestionDraft, Vote
from qzoom.distill.pictures import load_source
from qzoom.distill.roles import DistractorWriter, Role
from qzoom.errors import CallRefusedError, ConfigError, DataError
from qzoom.scoring.agree import normal
from qzoom.scoring.letters import LETTERS
from tests.distill.views import ITEM, KNOWN, Judge, StillViews

VIEWS = StillViews()
ANSWERED = dataclasses.replace(ITEM, answer=Agreement("A4", 6, 8, (("a", 3), ("b", 3))), votes=(Vote("a", 0, "A4"),))
PLAIN = ChoicesSettings(none_share=0.0, negatives=0.0)


def writer(*texts: str, refuses: bool = False) -> DistractorWriter:
    """Offers the texts."""

    def write(item: Item, views: Any, count: int) -> Sequence[str]:
        if refuses:
            raise CallRefusedError("HTTP 413")
        return texts

    return Role("writer", "writer@1", write)


BY_RULE = Role("rule", "rule", by_rule.write_distractors)


def answered(text: str) -> Item:
    return dataclasses.replace(ANSWERED, answer=Agreement(text, 6, 8, ()))


def right_option(item: Item) -> str:
    assert item.choices is not None
    return item.choices.options[LETTERS.index(item.choices.letter)]


def test_options_are_distinct_in_an_order_of_the_item_and_differ_in_meaning():
    offered = ("a4", "A4.", " B7 ", "b7", "", "C 9", "D1", "E5")
    (item,) = ChoicesStep(writer(*offered), VIEWS, PLAIN)(ANSWERED)
    assert item.choices is not None
    assert sorted(item.choices.options) == ["A4", "B7", "C 9", "D1"]
    assert right_option(item) == "A4"
    assert item.choices.writer == "writer"
    assert ("distractor_writer", "writer@1") in item.models
    step = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, PLAIN)
    assert step(ANSWERED) == step(ANSWERED)
    letters = {step(dataclasses.replace(ANSWERED, seed=seed))[0].choices.letter for seed in range(40)}
    assert letters == set("ABCD")
    (item,) = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, PLAIN)(ANSWERED)
    assert by_rule.read(item, None, "", 0, name="s", error_rate=0.0).text == item.choices.letter
    assert by_rule.read(ANSWERED, None, "", 0, name="s", error_rate=0.0).text == "A4"
    offered = ("maroon", "red", "blue", "green", "grey")
    (alone,) = ChoicesStep(writer(*offered), VIEWS, PLAIN)(answered("dark red"))
    assert set(alone.choices.options) == {"dark red", "maroon", "blue", "green"}  # "dark red" holds "red"
    (judged,) = ChoicesStep(writer(*offered), VIEWS, PLAIN, judge=Judge(("dark red", "maroon")))(answered("dark red"))
    assert set(judged.choices.options) == {"dark red", "red", "blue", "green"}


@pytest.mark.parametrize(
    ("distractor_writer", "reason"),
    [
        (writer("A4", "a4", "B7"), "too few distinct options"),
        (writer(refuses=True), "the distractor writer refused the picture"),
    ],
)
def test_without_enough_options_a_question_stays_open_or_goes(distractor_writer, reason):
    (kept,) = ChoicesStep(distractor_writer, VIEWS, PLAIN)(ANSWERED)
    assert (kept.choices, kept.kept, kept.decisions[-1].reason) == (None, True, reason)
    (gone,) = ChoicesStep(distractor_writer, VIEWS, dataclasses.replace(PLAIN, required=True))(ANSWERED)
    assert (gone.kept, gone.decisions[-1].reason) == (False, reason)


def test_options_by_rule_fit_the_answer():
    for right, other in (("yes", "no"), ("Left", "Right")):
        (item,) = ChoicesStep(BY_RULE, VIEWS, PLAIN)(answered(right))
        assert set(item.choices.options) == {right, other}
    for seed in range(30):
        (item,) = ChoicesStep(BY_RULE, VIEWS, PLAIN)(dataclasses.replace(ANSWERED, seed=seed))
        forms = {normal(option) for option in item.choices.options}
        assert len(forms) == 4
        assert "b9" not in forms  # printed in the crop
        assert "c7" in forms  # printed elsewhere
    company = dataclasses.replace(ANSWERED, draft=dataclasses.replace(ITEM.draft, text="Which company is it?"))
    company = dataclasses.replace(company, answer=Agreement("LIM MOTOR SDN BHD", 6, 8, ()))
    (item,) = ChoicesStep(BY_RULE, VIEWS, PLAIN)(company)
    assert len(item.choices.options) == 4
    assert not {"A4", "C7", "THANK YOU"} & set(item.choices.options)


class Guesser(Role):
    """Picks an option by its text, or fails."""

    def __init__(self, *picks: str) -> None:
        texts: list[str] = []

        def read(item: Item, image: Any, text: str, sample: int) -> Vote:
            assert image is None
            texts.append(text)
            pick = picks[sample % len(picks)]
            if pick == "!":
                return Vote("guesser", sample, "", "failed", "HTTP 500")
            line = next(line for line in text.split("\n") if line.endswith(f". {pick}"))
            return Vote("guesser", sample, line[0])

        super().__init__("guesser", "guesser@1", read)
        object.__setattr__(self, "texts", texts)


def guessed(*picks: str, guesses: int = 6) -> tuple[Item, Guesser]:
    guesser = Guesser(*picks)
    settings = dataclasses.replace(PLAIN, guesses=guesses)
    (item,) = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, settings, guesser)(ANSWERED)
    return item, guesser


def test_what_is_solved_without_the_picture_goes():
    item, guesser = guessed("A4")
    assert item.decisions[-1].reason == "solved without the picture"
    assert len(set(guesser.texts)) > 1  # the options are shuffled anew
    assert guesser.texts[0].startswith(ANSWERED.draft.text + "\nA. ")


@pytest.mark.parametrize("picks", [("A4", "B7", "C9"), ("B7",), ("!",), ("A4", "!", "!", "!", "!", "!")])
def test_what_chance_or_failures_explain_stays(picks):
    assert guessed(*picks)[0].kept


def test_positives_list_none_of_these_now_and_then_and_never_as_right():
    settings = dataclasses.replace(PLAIN, none_share=0.5)
    items = [
        ChoicesStep(writer("B7", "C9", "D1"), VIEWS, settings)(dataclasses.replace(ANSWERED, seed=seed))[0]
        for seed in range(100)
    ]
    listed = [item for item in items if NONE_OPTION in item.choices.options]
    assert 30 <= len(listed) <= 70
    assert all(len(item.choices.options) == 4 and right_option(item) == "A4" for item in items)


def test_a_missing_option_is_a_paired_negative():
    settings = ChoicesSettings(none_share=0.0, negatives=1.0, negative_kinds=("missing",))
    positive, negative = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, settings)(ANSWERED)
    assert (positive.draft.negative, positive.draft.pair) == (False, "")
    assert (negative.draft.negative, negative.draft.pair) == (True, positive.id)
    assert negative.draft.text == positive.draft.text
    assert negative.id != positive.id
    assert set(negative.choices.options) == {"B7", "C9", "D1", NONE_OPTION}
    assert right_option(negative) == NONE_OPTION
    assert (negative.answer.text, negative.answer.by, negative.votes) == (NONE_OPTION, "rule", ())
    assert negative.kept
    assert negative.target == positive.target


def test_an_absent_thing_is_a_paired_negative():
    settings = ChoicesSettings(none_share=0.0, negatives=1.0, negative_kinds=("absent",))
    positive, negative = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, settings)(ANSWERED)
    assert negative.draft.pair == positive.id
    assert negative.draft.negative
    assert negative.draft.text.startswith("What is the code on the ")
    assert "red star" not in negative.draft.text
    assert "blue cross" not in negative.draft.text
    assert negative.answer.text == "none"
    assert len(negative.choices.options) == 4
    assert right_option(negative) == NONE_OPTION
    open_form = ChoicesStep(None, VIEWS, settings)(ANSWERED)
    assert [item.choices for item in open_form] == [None, None]
    assert open_form[1].answer.text == "none"


def test_the_share_of_negatives_holds():
    settings = ChoicesSettings(negatives=0.3)
    step = ChoicesStep(writer("B7", "C9", "D1"), VIEWS, settings)
    made = [step(dataclasses.replace(ANSWERED, seed=seed)) for seed in range(200)]
    negatives = [items[1] for items in made if len(items) == 2]
    assert 40 <= len(negatives) <= 80
    missing = sum(item.answer.text == NONE_OPTION for item in negatives)
    assert 0.25 <= missing / len(negatives) <= 0.75
    assert all(len(item.choices.options) == 4 for item in negatives)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="can never be told from chance"):
        ChoicesSettings(guesses=2)
    with pytest.raises(ConfigError, match="must be one of absent, missing"):
        ChoicesSettings(negative_kinds=("gone",))
    with pytest.raises(ConfigError, match="options"):
        ChoicesSettings(options=1)
    with pytest.raises(ConfigError, match="required must be true or false"):
        ChoicesSettings(required=1)
    with pytest.raises(DataError, match="run the step vote first"):
        ChoicesStep(None, VIEWS)(ITEM)


def asking(text: str, answer: str = "x", seed: int = 0) -> Item:
    return dataclasses.replace(
        ITEM, draft=QuestionDraft(text, "ocr", "rule", known=answer), answer=Agreement(answer, 6, 8, ()), seed=seed
    )


def facts_of(text: str, answer: str, field: str, printed: str = "") -> Known:
    things = (SceneObject("red", "star", (0, 0, 9, 9)), SceneObject("blue", "cross", (20, 0, 29, 9)))
    lines = ((printed, (0, 0, 9, 9)),) if printed else ()
    return Known((KnownQuestion(text, answer, ((0, 0, 9, 9),), field),), () if printed else things, lines)


def test_a_yes_becomes_a_no_a_count_zero_and_names_are_exchanged():
    text = "Is there a red star?"
    no = absent(asking(text, "yes"), facts_of(text, "yes", "exists"))
    assert no is not None
    assert (no.draft.text != text, no.answer.text) == (True, "no")
    text = "How many crosses are there?"
    zero = absent(asking(text, "1"), facts_of(text, "1", "count"))
    assert zero is not None
    assert zero.draft.text in {f"How many {s} are there?" for s in ("circles", "squares", "triangles", "diamonds")}
    assert zero.answer.text == "0"
    text = "What is the price of HOT TEA?"
    price = absent(asking(text, "3.50"), facts_of(text, "3.50", "price", "HOT TEA"))
    assert price is not None
    assert price.draft.text.startswith("What is the price of ")
    assert "HOT TEA" not in price.draft.text
    text = "What is the member id?"
    value = absent(asking(text, "123"), facts_of(text, "123", "value", "Member ID: 123"))
    assert value is not None
    assert value.draft.text.startswith("What is the ")
    assert "member id" not in value.draft.text
    assert (price.answer.text, value.answer.text) == ("none", "none")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("What is the total?", facts_of("What is the total?", "3", "total", "TOTAL")),
        ("Is the red star left of the blue cross?", facts_of("Is the red star left of the blue cross?", "yes", "side")),
        ("What is the date?", Known()),
    ],
)
def test_what_names_nothing_has_no_negative(text, facts):
    assert absent(asking(text), facts) is None


def test_the_negative_is_the_items_own():
    made = [absent(asking("What is the code on the red star?", "A4", seed), KNOWN) for seed in range(30)]
    assert len({one.draft.text for one in made if one}) > 5
    assert absent(asking("What is the code on the red star?", "A4", 3), KNOWN) == made[3]
    first = made[0]
    assert first is not None
    assert first.draft.pair == asking("What is the code on the red star?", "A4").id
    assert (first.draft.negative, first.votes, first.answer.by) == (True, (), "rule")


@pytest.mark.parametrize("source", ["scenes:5", "documents:11"])
def test_drawn_pictures_never_have_what_a_negative_asks_for(source):
    facts = load_source(source, "").known
    printed = [text.casefold() for text, _ in facts.texts]
    made = 0
    for question in facts.questions:
        negative = absent(asking(question.text, question.answer), facts)
        if negative is None:
            continue
        made += 1
        draft = negative.draft.text
        assert draft != question.text
        for thing in facts.objects:
            assert f"{thing.colour} {thing.shape}" not in draft
        if question.field in ("price", "cell"):
            name = draft.rsplit(" of ", 1)[-1].rstrip("?").casefold()
            assert not any(name in line for line in printed)
    assert made >= 2
