import pytest

from qzoom.scoring.letters import chosen_letter, chosen_letter_hrbench, chosen_letter_mme, chosen_letter_vstar

COLOURS = ("red", "blue", "Dark green", "black")


CLEAR = {
    "B": ["B", " b ", "B. blue"],
    "C": ["(C).", "The answer is C, I think", "dark  green"],
    "D": [
        "[d]", "Answer: (D)", "**D**", "__d__", "*D*.", "`D`", "**(D)**", "(**D**)", "**D.** black", "**D. black**",
        "<b>D</b>", "\\boxed{D}", "$\\boxed{\\text{D}}$", "So it is \\boxed{D. black}.", "$D$", "\\(D\\)", "(D)",
        "(d) black", "D!", '"D"', "Answer: **D**", "**Answer:** D", "**Answer: D**", "Answer: [D]",
        "The correct option is **(D)**.", "The answer is \\boxed{D}", "D is the correct answer",
        "I look at it: **D** it is", "D black", "D - black", "D.black", "D: it is black", "D\n\nThe car is black.",
        "The car is black.\n\nD", "<think>A or B?</think>\n**D**", "<answer>A</answer> no, <answer>D</answer>",
        "black.", "**Black**",
    ],
    "A": [
        "(A) it is red", "The answer is A, and B is wrong.", "The answer is A and I am sure", "Answer: A, A bus is red",
        "The answer is A. I ruled out B and C.", "A. red, not B", "A is correct, B is not", "The answer is A, not B",
    ],
    None: [
        "d dark green", "A\nThe car is blue.\nB", "Between **A** and **B**", "\\boxed{A} or \\boxed{B}",
        "(A) or (B)", "The answer is a mystery", "**E**", "**", "E", "Blue skies", "A dog", "It could be A or B",
        "The answer is A. No, the answer is B.", "",
        "The answer is A or B.", "Answer: A and C", "Answer: A, B", "The correct answer is (A) or (B)", "Answer: A/B",
        "A. red or B. blue", "(A) red, (C)", "answer \u212a", "answer \u0130",
        "The answer is A (red) or B (blue)", "Either A or B is correct",
        'The answer is "A" or "B"', "The answer is A, or option B", "**A** or B is the answer", "A. Red or B",
        "Answer: A & B", "(A), (B) and (C)", "The answer is C or A",
    ],
}  # fmt: skip


@pytest.mark.parametrize("letter", CLEAR)
def test_clear_answers(letter):
    for said in CLEAR[letter]:
        assert chosen_letter(said, COLOURS) == letter


def test_signs_inside_the_texts_of_options_are_no_markup():
    assert chosen_letter("2*3*4", ["234", "2*3*4"]) == "B"
    assert chosen_letter("$5 and $6", ["5 and 6", "$5 and $6"]) == "B"
    assert chosen_letter("5'", ["5", "5'"]) == "B"


def test_letters_inside_the_texts_of_options_are_no_second_letter():
    options = ["vitamins B and C", "B or C", "A and B", "none"]
    assert chosen_letter("A. vitamins B and C", options) == "A"
    assert chosen_letter("The answer is B. B or C", options) == "B"
    assert chosen_letter("(C) A and B", options) == "C"


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
