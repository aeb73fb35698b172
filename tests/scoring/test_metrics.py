import pytest

from qzoom.scoring.agree import exact_match, normalise
from qzoom.scoring.metrics import (
    METRICS,
    anls,
    anls_harness,
    contains_answer,
    contains_answer_harness,
    edit_distance,
    hit,
    is_unread,
    relaxed_match,
    relaxed_match_harness,
    union_share,
    vqa_accuracy,
    wilson_interval,
)


@pytest.mark.parametrize(
    "same",
    [
        ("33.90", "RM33.90", "rm 33.90", "$33.90", " $ 33.90 ", "33.90 RM", "MYR 33.90", "€33.90", "33.90€", "S$33.90"),
        ("-1.73", "RM-1.73", "-RM1.73", "-$1.73", "- 1.73"),
        ("1,007.50", "RM 1,007.50", "1,007.50 ringgit"),
        ("MR D.I.Y. (JOHOR) SDN BHD", "mr d.i.y.(johor) sdn bhd", "Mr D.I.Y. (Johor)  Sdn\nBhd"),
        ("12-01-19", "12 - 01 - 19"),
        ("STRASSE", "straße"),
        ("12.30", "12.30.", "12.30!", "12.30,", '"12.30"', "12.30 .", "“12.30”.", "12.30.”"),
        ("Yes", "Yes.", "yes!", "'Yes'", "«Yes».", 'Yes"', "„Yes“", "Yes。"),
        ("33.90", "33.90.", "33.90 RM."),
        (".", "."),
        ("the", "The."),
    ],
)
def test_equal_texts(same):
    assert all(exact_match(first, second) for first in same for second in same)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("33.9", "33.90"), ("33,90", "33.90"), ("1007.50", "1,007.50"), ("33.90;", "33.90"), (".", ""), (".", "!"),
        ("5'", '5"'), ('5"', "5"), ("Total: 33.90", "33.90"), ("33.90 34.00", "33.90"), ("-33.90", "33.90"),
        ("12/01/19", "12-01-19"), ("ARM 5 LTD", "A5 LTD"), ("S33.90", "33.90"), ("$$33.90", "33.90"), ("", "33.90"),
        ("RM", ""), ("SHOP RM", "SHOP"),
    ],
)  # fmt: skip
def test_different_texts(prediction, answer):
    assert not exact_match(prediction, answer)
    assert not exact_match(answer, prediction)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("33.90", "33.96", 1),
        ("ab", "ba", 2),
    ],
)  # fmt: skip
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == distance
    assert edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("33.90", ["33.90"], 1.0),
        ("33.96", ["33.90"], 0.8),
        ("  SYL   Roasted ", ["syl roasted"], 1.0),
        ("ab", ["ba"], 0.0),  # 2 edits of 2
        ("abcd", ["abxy"], 0.0),  # a distance of exactly one half
        ("ab", ["a"], 0.0),
        ("ab", ["ac"], 0.0),
        ("ab", ["a", "ac", "xy"], 0.0),
        ("abc", ["abd"], 2 / 3),
        ("33.90.", ["33.90"], 1.0),
        ("33.90", ["33.90!"], 1.0),
        ('"Yes."', ["yes"], 1.0),
        ("Yes,", ["Yes"], 1.0),
        (".", [""], 0.0),
        ("abcde", ["abxyz"], 0.0),  # 0.4 is below it
        ("kitten", ["dog", "sitting"], 1 - 3 / 7),
        ("", ["33.90"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_thresholds_intervals_and_the_harnesses_lengths():
    assert anls("abcde", ["abxyz"], threshold=0.4) == 0.0
    assert anls("abcde", ["abxyz"], threshold=0.39) == pytest.approx(0.4)
    assert anls_harness("abcd", ["abxy"]) == 0.5
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)
    assert anls_harness("33.96", ["33.90"]) == pytest.approx(0.8)
    # one edit of four normalised characters, but the raw prediction is ten long
    assert anls_harness("  ab    cx", ["ab cd"]) == pytest.approx(1 - 1 / 10)
    assert anls("  ab    cx", ["ab cd"]) == pytest.approx(1 - 1 / 5)
    assert anls_harness("ab", ["ba"]) == 0.0
    assert anls_harness("", [""]) == 1.0


@pytest.mark.parametrize(
    ("regions", "boxes", "found"),
    [
        ([(10, 10, 50, 50)], [(10, 10, 50, 50)], True),
        ([(10, 10, 50, 50)], [(10, 10, 51, 50)], False),
        ([(0, 0, 5, 5), (10, 10, 50, 50)], [(90, 90, 95, 95), (20, 20, 30, 30)], True),
        ([(0, 0, 25, 50), (25, 0, 50, 50)], [(20, 10, 30, 20)], False),  # two halves are no whole
        ([], [(1, 1, 2, 2)], False),
        ([(0, 0, 5, 5)], [], False),
    ],
)
def test_hit(regions, boxes, found):
    assert hit(regions, boxes) is found


@pytest.mark.parametrize(
    ("boxes", "share"),
    [
        ([], 0.0), ([(0, 0, 10, 10)], 0.1), ([(0, 0, 10, 10), (5, 0, 15, 10)], 0.15),
        ([(0, 0, 10, 10), (0, 0, 10, 10)], 0.1), ([(0, 0, 100, 2), (0, 0, 2, 10)], 0.2 + 0.016),
        ([(0, 0, 2, 2), (50, 5, 52, 7)], 0.008), ([(90, 0, 200, 10)], 0.1), ([(0, 0, 100, 10)], 1.0),
    ],
)  # fmt: skip
def test_union_share(boxes, share):
    assert union_share(boxes, (100, 10)) == pytest.approx(share, abs=1e-12)


PEOPLE = ["nike"] * 2 + ["Nike."] + ["adidas"] * 6 + ["the puma"]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("NIKE", (3 * 2 / 3 + 7 * 1) / 10),  # three agree: without one of them two are left
        ("adidas", 1.0),
        ("puma", (0 + 9 * 1 / 3) / 10),
        ("reebok", 0.0),
    ],
)
def test_vqa_accuracy(said, score):
    assert vqa_accuracy(said, PEOPLE) == pytest.approx(score)
    assert vqa_accuracy(said, PEOPLE, harness=True) == pytest.approx(score)
    assert PEOPLE[2] == "Nike."


ERASED = {
    (0.0, 1.0): [("", "A"), ("the", "A"), (".", "the"), ("?", "!")],
    (1.0, 1.0): [("a", "A"), ("A.", "A"), ("the cat", "A cat!")],
}  # fmt: skip


@pytest.mark.parametrize("expected", ERASED)
def test_an_answer_that_normalisation_erases_equals_only_itself(expected):
    strict, harness = expected
    for said, answer in ERASED[expected]:
        assert vqa_accuracy(said, [answer]) == strict
        assert vqa_accuracy(said, [answer] * 10) == strict
        assert vqa_accuracy(said, [answer] * 10, harness=True) == harness


def test_unread_choices_and_single_answers():
    assert is_unread("choice_vstar", "I cannot tell", ("red", "blue"))
    assert not is_unread("choice_mme", "**B**", ("red", "blue"))
    assert not is_unread("anls", "I cannot tell", ())
    assert vqa_accuracy("Two", ["2"]) == 1.0
    assert vqa_accuracy("Two", ["2"], harness=True) == 0.0
    assert normalise("The $2 Shop") == "the$2shop"
    assert normalise("RM Trading") == "rmtrading"


RELAXED = {
    (True, True): [
        ("104.9", "100"), ("95", "100"), ("50%", "0.5"), ("Red", "red"), ("0", "0"), ("30 %", "30%"), ("+5", "5"),
        (".5", "0.5"), ("2010", "2010."), ("2010.0", "2010"), ("2008", "2010.0"), ("-2008", "-2010"),
        ("20.08%", "20.10%"), ("3000", "3010"), ("998", "999"),
    ],
    (False, False): [
        ("105.1", "100"), ("50%", "50"), ("0.01", "0"), ("nan", "5"), ("", "5"), ("1,00", "100"), ("inf", "5"),
        ("1,00,000", "100000"),
    ],
    (True, False): [
        (" red", "red"), ("1,000", "1000"), ("0.0", "0"), ("Yes.", "Yes"), ("Yes!", "yes"), ('"Yes"', "Yes"),
        ("Yes,", "Yes"), ("10.4.", "10"), ("nan", "nan"), ("2,010", "2010"), ("2008", "2,010"),
    ],
    (False, True): [
        ("1_000", "1000"), ("30%%", "30%"), ("1e2", "100"), ("2008", "2010"), ("1000", "1001"), ("2999", "2998"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("expected", RELAXED)
def test_relaxed_match(expected):
    strict, harness = expected
    for said, answer in RELAXED[expected]:
        assert relaxed_match(said, answer) is strict
        assert relaxed_match_harness(said, answer) is harness


CONTAINED = {
    (True, True): [
        ("The word is CENTRE.", "centre"), ("No. 1!", "1"), ("ＡＢＣ", "abc"), ("new\nyork", "New York"),
        ("中文字", "文"),
    ],
    (False, True): [("2019", "1"), ("anything", "")],
    (True, False): [("new  york", "new york"), ("go to stop now", "Stop.")],
    (False, False): [("x", "y"), ("go", ".")],
}  # fmt: skip


@pytest.mark.parametrize("expected", CONTAINED)
def test_contained_answers(expected):
    strict, harness = expected
    for said, answer in CONTAINED[expected]:
        assert contains_answer(said, [answer]) is strict
        assert contains_answer_harness(said, [answer]) is harness
        assert contains_answer(said, ["not there", answer]) is strict


@pytest.mark.parametrize(("said", "found"), [("x ^ 2+ 1", True), ("X^2+1", False), ("ax^2+1b", True)])
def test_formulas_are_compared_without_spaces(said, found):
    assert contains_answer(said, ["x^2 + 1"], formula=True) is found
    assert contains_answer_harness(said, ["x^2 + 1"], formula=True) is found


@pytest.mark.parametrize(
    ("name", "said", "answers", "choices", "strict", "harness"),
    [
        ("exact_match", "RM 5.00", ("4.00", "5.00"), (), 1.0, 1.0),
        ("anls", "33.96", ("33.90", "x"), (), 0.8, 0.8),
        ("relaxed_accuracy", "1,000", ("1000",), (), 1.0, 0.0),
        ("contains", "2019", ("1",), (), 0.0, 1.0),
        ("contains_formula", "a + b", ("a+b",), (), 1.0, 1.0),
        ("vqa_accuracy", "two", ("2",) * 10, (), 1.0, 1.0),
        ("choice_vstar", "Blue", ("B",), ("red", "blue"), 1.0, 1.0),
        ("choice_vstar", "Brown", ("B",), ("red", "blue"), 0.0, 1.0),
        ("choice_mme", "", ("A",), ("red", "blue"), 0.0, 1.0),
        ("choice_hrbench", "the blue one", ("B",), ("red", "blue"), 0.0, 1.0),
    ],
)
def test_metrics_by_name(name, said, answers, choices, strict, harness):
    metric = METRICS[name]
    assert metric.strict(said, answers, choices) == pytest.approx(strict)
    assert metric.harness(said, answers, choices) == pytest.approx(harness)
