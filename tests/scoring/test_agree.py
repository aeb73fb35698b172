"""When answers say the same."""

from __future__ import annotations

import pytest

from qzoom.scoring.agree import mentions, normal, same


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
