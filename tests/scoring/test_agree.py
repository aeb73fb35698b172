import pytest

from qzoom.scoring.agree import answers_match, decide_exact, lowered, mentions, normal, normalise_answer, same

AGREE = {
    True: [
        ("1,234.50", "1234.5"), ("RM 12.50", "12.50"), ("$1,000", "1000.00"), ("Two", "2"),
        ("Yes.", "yes, there is one"), ("A red bus", "red bus."), ("**AB12**", "ab 12"), ("SDN. BHD.", "Sdn Bhd"),
        ("No. It is red.", "no"), ("NO!", "no, sir"), ("0.50", ".5"), ("-0.0", "0"), ("\u22123", "-3"),
        ("a red-brick house", "red brick house"), ("No. 12, Jalan Besar", "no. 12, jalan besar"), ("A+", "a+."),
        ("100", "100.0"),
    ],
    False: [
        ("12.50", "12.05"), ("0123", "123"), ("A4", "B4"), ("01/02/2024", "2024-02-01"), ("yes", "no"), ("7", "A7"),
        ("-3", "3"), ("", ""), ("", "red"), ("1,23", "123"),
        ("No.12", "No.13"), ("No.12", "no"), ("1" * 32, "1" * 31 + "2"), ("0." + "1" * 32, "0." + "1" * 31 + "2"),
    ],
    None: [("12 apples", "12"), ("no parking", "no"), ("red", "dark red"),
        ("No. 12, Jalan Besar", "No. 88, Jalan Kecil"), ("No: 12", "No: 13"), ("No.7 Main Street", "no"),
        ("No. B", "no"), ("No: IV", "No: V"), ("Yes, 12 of them", "yes"), ("A+", "A-"), ("C++", "C#"), ("O-", "O+"),
        ("A-", "A"), ("x < y", "x > y"), ("a+b", "a-b"), ("Blood type O+", "blood type O\u2212"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("verdict", AGREE)
def test_rules_join_part_and_leave_open(verdict):
    for first, second in AGREE[verdict]:
        assert same(first, second) is verdict
        assert same(second, first) is verdict


def test_signs_and_whole_words():
    assert normal("+") == "+"
    assert normal(" ** ") == ""
    assert normal("N/A") == "na"
    assert mentions("Is the Red  bus left?", "red bus")
    assert not mentions("How many buses are hired?", "red")
    assert not mentions("anything", "")


DECIDED = {
    True: [("RM 12.50", ["12.50"]), ("12.50", ["12.5", "12.50"]), ("Yes", ["yes"]), ("yes.", ["Yes"])],
    False: [("12.40", ["12.50"]), ("no", ["Yes"]), ("", ["anything"])],
    None: [("twelve", ["12"]), ("the cat", ["a cat"]), ("12", ["a dozen"]), ("7", ["eight", "8"])],
}  # fmt: skip


@pytest.mark.parametrize("right", DECIDED)
def test_rules_decide_what_they_can(right):
    for prediction, answers in DECIDED[right]:
        assert decide_exact(prediction, answers) is right


@pytest.mark.parametrize(
    ("before", "after"),
    [(" Total: $12.50 ", "total 1250"), ("ÄÖ!", "äö"), ("“x”", "“x”"), ("Dr. No.", "dr no"), (7, "7"), (None, "None")],
)
def test_normalise(before, after):
    assert normalise_answer(before) == after


def test_lowered_and_contained_answers():
    assert normalise_answer("! yes") == " yes"
    assert lowered(" No. 5 ") == "no. 5"
    assert lowered(True) == "true"
    assert answers_match("12", "12 eur")
    assert answers_match("12 eur", "12")
    assert answers_match("", "anything")
    assert not answers_match("12", "21")
