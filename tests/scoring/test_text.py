import pytest

from qzoom.scoring.metrics import METRICS
from qzoom.scoring.text import number_in, plain_answer, release_letter, release_part, same_answer, same_answer_release


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Two.", "2"),
        ("The cat", "cat"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.50", "3.50"),
        ("St. John's", "st john 's"),  # a possessive is set apart
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("a-b", "b"),
        ("  an  apple\n", "apple"),
        ("twas", "'twas"),
        ("", ""),
    ],
)
def test_both_variants(text, plain):
    assert plain_answer(text) == plain_answer(text, harness=True)
    assert plain_answer(text) == plain


def test_the_harness_keeps_its_slips():
    assert plain_answer("somebody'd") == "somebody'd"
    assert plain_answer("somebody'd", harness=True) == "somebodyd"
    stops = ". " * 40 + "x"
    assert plain_answer(stops) == "x"
    assert plain_answer(stops, harness=True) == " ".join(["."] * 8) + " x"


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        ("I think.\n<answer>B</answer> or <answer>C</answer>", "B"),
        ("cut off <answer>B", "B"),
        ("It is red.\nAnswer: B", "Answer: B"),
        ("one\ntwo\nthree\nfour", "two\nthree\nfour"),
    ],
)
def test_part(reply, part):
    assert release_part(reply) == part


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(C)", "C"), ("B. red", "B"), ("Answer: B", "A"), ("A red bus", "A"), ("I think C", "I"),
        ("Option C", "O"), ("the answer is (D).", "D"), ("none of them", None),
    ],
)  # fmt: skip
def test_letter(reply, letter):
    assert release_letter(reply) == letter


NUMBERS = {
    3.0: ["3", "There are 3 cups.", "three", "three, that is 3"],
    1200.0: ["1,200"],
    -2.5: ["-2.5"],
    None: ["3 or 4", "no number", "A3", "12-01-19"],
}  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_number(number):
    for text in NUMBERS[number]:
        assert number_in(text) == number


SHORT = {
    (True, True): [("3", "3"), ("3.0", "3"), ("Three", "3")],
    (True, False): [("There are 3 cups", "3"), ("Exit.", "exit"), ("<answer>2</answer> no, <answer>3</answer>", "3")],
    (False, False): [("3 or 4", "3"), ("13", "3"), ("the exit", "exit"), ("route 66", "66 north")],
}  # fmt: skip


@pytest.mark.parametrize("expected", SHORT)
def test_short_answers(expected):
    strict, release = expected
    for reply, answer in SHORT[expected]:
        assert same_answer(reply, answer) is strict
        assert same_answer_release(reply, answer) is release


def test_metrics():
    letters, blank = METRICS["choice_zoombench"], METRICS["blank_zoombench"]
    assert letters.strict("The answer is B", ("B",), ("red", "blue")) == 1.0
    assert letters.strict("A red bus", ("A",), ("red", "blue")) == 0.0
    assert letters.harness("A red bus", ("A",), ("red", "blue")) == 1.0
    assert (blank.strict("4 dogs", ("4",), ()), blank.harness("4 dogs", ("4",), ())) == (1.0, 0.0)
