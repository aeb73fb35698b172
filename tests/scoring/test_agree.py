"""The three rules for short answers: agreement, exact, containment."""

from __future__ import annotations

import pytest

from qzoom.scoring.agree import answers_match, decide_exact, lowered, mentions, normal, normalise_answer, same


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("1,234.50", "1234.5", True),
        ("RM 12.50", "12.50", True),
        ("$1,000", "1000.00", True),
        ("Two", "2", True),
        ("Yes.", "yes, there is one", True),
        ("A red bus", "red bus.", True),
        ("**AB12**", "ab 12", True),
        ("SDN. BHD.", "Sdn Bhd", True),
        ("12.50", "12.05", False),
        ("0123", "123", False),
        ("A4", "B4", False),
        ("01/02/2024", "2024-02-01", False),
        ("yes", "no", False),
        ("7", "A7", False),
        ("-3", "3", False),
        ("", "", False),
        ("", "red", False),
        ("12 apples", "12", None),
        ("no parking", "no", None),
        ("red", "dark red", None),
        ("1,23", "123", False),
    ],
)
def test_rules_join_part_and_leave_open(first: str, second: str, verdict: bool | None) -> None:
    assert same(first, second) is verdict
    assert same(second, first) is verdict


def test_what_is_only_signs_stays_itself() -> None:
    assert normal("+") == "+"
    assert normal(" ** ") == ""
    assert normal("N/A") == "na"


def test_an_answer_is_found_as_whole_words_only() -> None:
    assert mentions("Is the Red  bus left?", "red bus")
    assert not mentions("How many buses are hired?", "red")
    assert not mentions("anything", "")


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("RM 12.50", ["12.50"], True),
        ("12.50", ["12.5", "12.50"], True),
        ("12.40", ["12.50"], False),
        ("Yes", ["yes"], True),
        ("no", ["Yes"], False),
        ("yes.", ["Yes"], True),
        ("", ["anything"], False),
        ("twelve", ["12"], None),
        ("the cat", ["a cat"], None),
        ("12", ["a dozen"], None),
        ("7", ["eight", "8"], None),
    ],
)
def test_rules_decide_what_they_can(prediction, answers, right):
    assert decide_exact(prediction, answers) is right


@pytest.mark.parametrize(
    ("before", "after"),
    [(" Total: $12.50 ", "total 1250"), ("ÄÖ!", "äö"), ("“x”", "“x”"), ("Dr. No.", "dr no"), (7, "7"), (None, "None")],
)
def test_normalise(before, after):
    assert normalise_answer(before) == after


def test_white_space_freed_by_punctuation_stays():
    assert normalise_answer("! yes") == " yes"


def test_lowered_keeps_punctuation():
    assert lowered(" No. 5 ") == "no. 5"
    assert lowered(True) == "true"


def test_match_is_containment_either_way():
    assert answers_match("12", "12 eur")
    assert answers_match("12 eur", "12")
    assert answers_match("", "anything")
    assert not answers_match("12", "21")
