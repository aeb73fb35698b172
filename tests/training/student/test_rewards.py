import math

import pytest

from qzoom.scoring.judge import JudgeFailure
from qzoom.training.student.data import ExportedQuestion
from qzoom.training.student.rewards import (
    Reward,
    accuracy,
    answer_of,
    combine,
    counting_reward,
    number_of,
    well_formed,
    wrap,
)


def asked(text, answer, choices=(), letter="", kind="other"):
    return ExportedQuestion("", "", text, answer, None, choices, letter, kind)


OPTIONS = asked("Which?", "B", ("a blue car", "a red bus", "A boat"), "B")
COUNT = asked("How many?", "7", kind="counting")
TEXT = asked("What does it say?", "EXIT ONLY")


@pytest.mark.parametrize(
    ("reply", "form", "answer"),
    [
        ("<answer>B</answer>", "plain", "B"), ("so\n<answer>\nThe red\nbus\n</answer>\n", "tags", "The red\nbus"),
        ("<answer>A</answer> no, <answer>B</answer>", "tags", "B"), ("<ANSWER>B</Answer>", "tags", "B"),
        ("<answer>A<answer>B</answer>", "tags", "B"), ("<answer>B", "tags", None), ("<answer>B", "plain", None),
        ("<answer>  </answer>", "plain", None), ("B", "tags", None), (" B \n", "plain", "B"), ("", "plain", None),
        ("word " * 61, "plain", None), ("word " * 100 + "<answer>B</answer>", "plain", "B"),
    ],
)  # fmt: skip
def test_answers_are_parsed_strictly(reply, form, answer):
    assert answer_of(reply, form) == answer


def test_form():
    assert well_formed("I see.\n<answer>B</answer>\n", "tags")
    for reply in ("B", "<answer>A</answer><answer>B</answer>", "<answer>B</answer> done", "<answer> </answer>"):
        assert not well_formed(reply, "tags")
    assert well_formed("B", "plain")
    assert not well_formed("x" * 301, "plain")
    assert answer_of(wrap("EXIT", "tags"), "tags") == "EXIT"
    assert wrap("EXIT") == "EXIT"


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("B", 1.0), ("(B)", 1.0), ("b.", 1.0), ("Answer: B", 1.0), ("The answer is B", 1.0), ("B. a red bus", 1.0),
        ("A red bus", 1.0), ("a blue car", 0.0), ("I think C", 0.0), ("A or B: the answer is A, the answer is B", 0.0),
        ("D", 0.0), ("none", 0.0), ("<answer>A</answer> wait <answer>\nB\n</answer>", 1.0),
    ],
)  # fmt: skip
def test_choices(reply, value):
    assert accuracy(reply, OPTIONS) == Reward(value, 1.0, "letter")


@pytest.mark.parametrize(
    ("reply", "value"),
    [("7", 1.0), ("seven", 1.0), ("7.0", 1.0), ("7.", 1.0), ("8", 0.0), ("7 cars", 0.0), ("<answer>7</answer>", 1.0)],
)
def test_numbers(reply, value):
    assert accuracy(reply, COUNT).accuracy == value


@pytest.mark.parametrize(
    ("said", "known", "value"),
    [(7, 7, 1.0), (6, 8, 0.75), (20, 8, 0.0), (None, 8, 0.0), (0, 0, 1.0), (2, 0, math.exp(-2))],
)
def test_counting_by_relative_error(said, known, value):
    assert counting_reward(said, known) == pytest.approx(value)


def test_counting_is_an_option_for_counting_questions_and_amounts_keep_their_digits():
    assert accuracy("6", asked("How many?", "8", kind="counting"), counting=True).accuracy == 0.75
    assert accuracy("6", asked("How many?", "8", kind="counting")).accuracy == 0.0
    assert accuracy("6", asked("Which bus?", "8", kind="ocr"), counting=True).accuracy == 0.0
    assert accuracy("RM 33.90", asked("Total?", "33.90")).accuracy == 1.0
    assert accuracy("33.80", asked("Total?", "33.90")).accuracy == 0.0
    assert accuracy("1,250", asked("Total?", "1250")).accuracy == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [("12", 12), ("1,234.5", 1234.5), ("-3", -3), ("50%", 50), ("Three", 3), ("3 cats", None), ("", None), ("-", None)],
)
def test_number_of(text, number):
    assert number_of(text) == number


class Verdicts:
    """A judge that knows one answer, notes who asked, and may be out of order."""

    def __init__(self, works: bool = True) -> None:
        self.works = works
        self.seen: list[str] = []

    def __call__(self, question, answers, given):
        self.seen.append(given)
        if not self.works:
            raise JudgeFailure("no connection")
        return given == "only an exit"


def test_free_text_by_rule_then_judge():
    judge = Verdicts()
    assert accuracy("exit only.", TEXT, judge=judge) == Reward(1.0, 1.0, "rule")
    assert judge.seen == []
    assert accuracy("only an exit", TEXT, judge=judge) == Reward(1.0, 1.0, "judge")
    assert accuracy("entrance", TEXT, judge=judge) == Reward(0.0, 1.0, "judge")
    assert accuracy("yes", asked("Open?", "no"), judge=judge) == Reward(0.0, 1.0, "rule")
    assert accuracy("entrance", TEXT) == Reward(0.0, 1.0, "unjudged")
    assert judge.seen == ["only an exit", "entrance"]


def test_a_failed_judge_gives_no_reward_and_none_is_asked_in_vain():
    failed = accuracy("entrance", TEXT, judge=Verdicts(works=False))
    assert failed == Reward(None, 1.0, "failed")
    assert combine(failed, 0.0) is None
    assert combine(failed, 0.5) is None
    judge = Verdicts()
    assert accuracy("D", OPTIONS, judge=judge).accuracy == 0.0
    assert accuracy("", TEXT, judge=judge) == Reward(0.0, 0.0, "empty")
    assert judge.seen == []
    assert combine(Reward(1.0, 0.0, "rule"), 0.0) == 1.0
    assert combine(Reward(1.0, 0.0, "rule"), 0.25) == 0.75
    assert combine(Reward(0.0, 1.0, "rule"), 0.25) == 0.25
