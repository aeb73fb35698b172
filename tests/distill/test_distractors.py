"""Wrong answers of the same format."""

from __future__ import annotations

import random
import re

import pytest

from qzoom.distill.distractors import draw_distractors, format_of
from qzoom.scoring.agree import normal


@pytest.mark.parametrize(
    ("answer", "pattern"),
    [
        ("AB123", r"[A-Z]{2}\d{3}"),
        ("12.50", r"[1-9]\d\.\d\d"),
        ("1,204.00", r"[1-9],\d{3}\.\d\d"),
        ("25/12/2018", r"(0[1-9]|1\d|2[0-8])/(0[1-9]|1[0-2])/2018"),
        ("2018-03-07", r"2018-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"),
        ("7 MAR 2018", r"\d{1,2} MAR 2018"),
        ("09:15 PM", r"(0[1-9]|1[0-2]):[0-5]\d PM"),
        ("Red", r"[A-Z][a-z]+"),
        ("VEQ", r"[A-Z]{3}"),
        ("7", r"\d{1,2}"),
        ("LIM HARDWARE SDN BHD", r"[A-Z0-9&().,/ -]+"),
    ],
)
def test_format_stays_and_all_differ(answer: str, pattern: str) -> None:
    for seed in range(20):
        made = draw_distractors(answer, 3, random.Random(seed))
        assert len(made) == 3
        assert len({normal(text) for text in (answer, *made)}) == 4
        assert all(re.fullmatch(pattern, text) for text in made), made


def test_closed_answers_have_one_other() -> None:
    assert draw_distractors("yes", 3, random.Random(0)) == ["no"]
    assert draw_distractors("Left", 3, random.Random(0)) == ["Right"]


def test_the_pictures_own_values_come_first() -> None:
    made = draw_distractors("A42", 3, random.Random(0), pool=["B17", "a 42", "red", "C9", "D55"])
    assert set(made[:2]) == {"B17", "D55"}
    assert format_of(made[2]) == "A99"


def test_a_seed_is_a_choice() -> None:
    assert draw_distractors("12.50", 3, random.Random("x")) == draw_distractors("12.50", 3, random.Random("x"))
