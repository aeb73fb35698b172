"""Which option an answer names, by hand; the harness variants keep lmms-eval's slips."""

import pytest

from qzoom.scoring.letters import chosen_letter, chosen_letter_hrbench, chosen_letter_mme, chosen_letter_vstar

COLOURS = ("red", "blue", "Dark green", "black")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(C).", "C"),
        ("[d]", "D"),
        ("B. blue", "B"),
        ("(A) it is red", "A"),
        ("The answer is C, I think", "C"),
        ("Answer: (D)", "D"),
        ("dark  green", "C"),
        ("E", None),
        ("Blue skies", None),
        ("A dog", None),
        ("It could be A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("", None),
    ],
)
def test_clear_answers(said, letter):
    assert chosen_letter(said, COLOURS) == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("Blue", "B"),  # the first letter of any word
        ("It is (C)", "C"),
        ("Answer: D", "A"),  # "Answer" begins with one
        ("The red one. B. maybe", "B"),
        ("I see a dog", "A"),  # a lone article
        ("fox", None),
        ("", None),
    ],
)
def test_vstar(said, letter):
    assert chosen_letter_vstar(said) == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The best answer is C", "C"),
        ("(E)", "E"),
        ("Don't know", "D"),
        ("c", "C"),  # held by "(c)"
        ("", "A"),  # the empty text is held by the first option
        ("one two three four five six seven eight nine ten eleven", ""),
        ("the", ""),
    ],
)
def test_mme(said, letter):
    assert chosen_letter_mme(said) == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),  # the text of an option
        ("B. blue", "B"),
        ("A or B", None),
        ("the blue one", "B"),
        ("blue and red", None),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
        ("purple", None),
    ],
)
def test_hrbench(said, letter):
    options = COLOURS if said != "(b)" else ("(a)", "(b)", "(c)", "(d)")
    assert chosen_letter_hrbench(said, options) == letter
