import dataclasses
import random
import re

import pytest

from qzoom.distill import by_rule
from qzoom.distill.ask import ask_step, validate_step
from qzoom.distill.by_rule import draw_distractors, format_of, kind_of, leak
from qzoom.distill.items import Known, KnownQuestion, QuestionDraft
from qzoom.distill.roles import Role
from qzoom.scoring.agree import normal
from tests.distill.views import ITEM, KNOWN, StillViews

EMPTY = dataclasses.replace(ITEM, draft=None)
WRITER = Role("rule", "rule", by_rule.write_questions)
VALIDATOR = Role("rule", "rule", by_rule.validate)


def test_it_asks_what_the_place_answers():
    draft = by_rule.write_questions(EMPTY, StillViews())
    assert draft == (
        QuestionDraft("What is the code on the red star?", "ocr", "rule", known="A4"),
        QuestionDraft("How many crosses are there?", "counting", "rule", known="1"),
    )
    items = ask_step(WRITER, StillViews())(EMPTY)
    assert [item.draft.known for item in items] == ["A4", "1"]
    assert all(item.kept and item.models == (("question_writer", "rule"),) for item in items)
    (none,) = ask_step(WRITER, StillViews(Known()))(EMPTY)
    assert none.decisions[-1].reason == "no question about this place"
    assert not none.kept


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        (QuestionDraft("What is the code on the red star?", "ocr", "x"), ""),
        (QuestionDraft("What is the code on the blue cross?", "ocr", "x"), "not answerable from the crop"),
        (QuestionDraft("How many stars are there?", "counting", "x"), "not answerable from the crop"),
        (
            QuestionDraft("How many crosses are there?", "counting", "x"),
            "a count of the whole picture, which no crop shows",
        ),
        (QuestionDraft("Who made it?", "ocr", "x"), "a question that the picture does not know"),
        (QuestionDraft("What is written in this crop?", "ocr", "x"), "the question points at the crop or a box"),
        (QuestionDraft("Which tag says A4?", "ocr", "x", known="a4"), "the question holds the answer"),
    ],
)
def test_a_question_is_checked(draft, reason):
    (item,) = validate_step(VALIDATOR, StillViews())(dataclasses.replace(ITEM, draft=draft))
    assert item.decisions[-1].reason == reason
    assert item.kept is (reason == "")


def test_uniqueness_leaks_and_kinds():
    twice = Known((*KNOWN.questions, KnownQuestion(ITEM.draft.text, "Z9", ((5, 5, 9, 9),), "code")))
    (item,) = validate_step(VALIDATOR, StillViews(twice))(ITEM)
    assert item.decisions[-1].reason == "not unique in the whole picture"
    again = Known((*KNOWN.questions, KnownQuestion(ITEM.draft.text, "a4", ((5, 5, 9, 9),), "code")))
    assert validate_step(VALIDATOR, StillViews(again))(ITEM)[0].kept
    assert leak("Is the star left or right of the cross?", "left") == ""
    assert leak("Is there no star?", "no") == ""

    def kind(text: str, answer: str, field: str = "") -> str:
        return kind_of(KnownQuestion(text, answer, (), field))

    assert kind("anything", "x", "side") == "spatial"
    assert kind("anything", "x", "total") == "ocr"
    assert kind("How many stars?", "3") == "counting"
    assert kind("What colour is it?", "red") == "colour"
    assert kind("Is it open?", "Yes.") == "identification"
    assert kind("What is the date?", "1/2/2024") == "ocr"


def test_the_teacher_that_knows_errs_as_often_as_told_and_always_alike():
    def answers(rate: float) -> list[str]:
        votes = [by_rule.answer(ITEM, StillViews(), sample, name="t", error_rate=rate) for sample in range(400)]
        return [vote.text for vote in votes]

    assert set(answers(0.0)) == {"A4"}
    wrong = [text for text in answers(0.25) if text != "A4"]
    assert 60 <= len(wrong) <= 140
    assert answers(0.25) == answers(0.25)
    unknown = dataclasses.replace(ITEM, draft=dataclasses.replace(ITEM.draft, known=""))
    assert by_rule.answer(unknown, StillViews(), 0, name="t", error_rate=0.0).status == "abstained"


@pytest.mark.parametrize(
    ("answer", "pattern"),
    [
        ("AB123", r"[A-Z]{2}\d{3}"), ("12.50", r"[1-9]\d\.\d\d"), ("1,204.00", r"[1-9],\d{3}\.\d\d"),
        ("25/12/2018", r"(0[1-9]|1\d|2[0-8])/(0[1-9]|1[0-2])/2018"),
        ("2018-03-07", r"2018-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])"), ("7 MAR 2018", r"\d{1,2} MAR 2018"),
        ("09:15 PM", r"(0[1-9]|1[0-2]):[0-5]\d PM"), ("Red", r"[A-Z][a-z]+"), ("VEQ", r"[A-Z]{3}"), ("7", r"\d{1,2}"),
        ("LIM HARDWARE SDN BHD", r"[A-Z0-9&().,/ -]+"),
    ],
)  # fmt: skip
def test_format_stays_and_all_differ(answer, pattern):
    for seed in range(20):
        made = draw_distractors(answer, 3, random.Random(seed))
        assert len(made) == 3
        assert len({normal(text) for text in (answer, *made)}) == 4
        assert all(re.fullmatch(pattern, text) for text in made), made


def test_distractors_are_closed_seeded_and_the_pictures_own():
    assert draw_distractors("yes", 3, random.Random(0)) == ["no"]
    assert draw_distractors("Left", 3, random.Random(0)) == ["Right"]
    made = draw_distractors("A42", 3, random.Random(0), pool=["B17", "a 42", "red", "C9", "D55"])
    assert set(made[:2]) == {"B17", "D55"}
    assert format_of(made[2]) == "A99"
    assert draw_distractors("12.50", 3, random.Random("x")) == draw_distractors("12.50", 3, random.Random("x"))
