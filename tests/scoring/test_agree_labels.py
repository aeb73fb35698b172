"""Normalising and comparing short answers."""

from __future__ import annotations

import pytest

from qzoom.scoring.agree import answers_match, lowered, normalise_answer


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
