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
        ("**D**", "D"),
        ("__d__", "D"),
        ("*D*.", "D"),
        ("`D`", "D"),
        ("**(D)**", "D"),
        ("(**D**)", "D"),
        ("**D.** black", "D"),
        ("**D. black**", "D"),
        ("<b>D</b>", "D"),
        ("\\boxed{D}", "D"),
        ("$\\boxed{\\text{D}}$", "D"),
        ("So it is \\boxed{D. black}.", "D"),
        ("$D$", "D"),
        ("\\(D\\)", "D"),
        ("(D)", "D"),
        ("(d) black", "D"),
        ("D!", "D"),
        ('"D"', "D"),
        ("Answer: **D**", "D"),
        ("**Answer:** D", "D"),
        ("**Answer: D**", "D"),
        ("Answer: [D]", "D"),
        ("The correct option is **(D)**.", "D"),
        ("The answer is \\boxed{D}", "D"),
        ("D is the correct answer", "D"),
        ("I look at it: **D** it is", "D"),
        ("D black", "D"),
        ("D - black", "D"),
        ("D.black", "D"),
        ("D: it is black", "D"),
        ("d dark green", None),
        ("D\n\nThe car is black.", "D"),
        ("The car is black.\n\nD", "D"),
        ("A\nThe car is blue.\nB", None),
        ("<think>A or B?</think>\n**D**", "D"),
        ("<answer>A</answer> no, <answer>D</answer>", "D"),
        ("black.", "D"),
        ("**Black**", "D"),
        ("Between **A** and **B**", None),
        ("\\boxed{A} or \\boxed{B}", None),
        ("(A) or (B)", None),
        ("The answer is a mystery", None),
        ("**E**", None),
        ("**", None),
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


def test_signs_inside_the_texts_of_options_are_no_markup():
    assert chosen_letter("2*3*4", ["234", "2*3*4"]) == "B"
    assert chosen_letter("$5 and $6", ["5 and 6", "$5 and $6"]) == "B"
    assert chosen_letter("5'", ["5", "5'"]) == "B"


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
