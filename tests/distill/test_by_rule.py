"""Roles that need no model, on a picture whose facts are written out and on drawn ones."""

from __future__ import annotations

import dataclasses

import pytest

from qzoom.distill.ask import AskStep, ValidateStep
from qzoom.distill.by_rule import RuleAsker, RuleTeacher, RuleValidator, kind_of, leak
from qzoom.distill.items import Asked, Known, KnownQuestion
from tests.distill.views import ITEM, KNOWN, StillViews

EMPTY = dataclasses.replace(ITEM, asked=None)


def test_it_asks_what_the_place_answers() -> None:
    asked = RuleAsker().ask(EMPTY, StillViews())
    assert asked == (
        Asked("What is the code on the red star?", "ocr", "rule", known="A4"),
        Asked("How many crosses are there?", "counting", "rule", known="1"),
    )


def test_a_step_makes_an_item_of_each_question() -> None:
    items = AskStep(RuleAsker(), StillViews())(EMPTY)
    assert [item.asked.known for item in items] == ["A4", "1"]
    assert all(item.kept and item.models == (("asker", "rule"),) for item in items)
    (none,) = AskStep(RuleAsker(), StillViews(Known()))(EMPTY)
    assert none.decisions[-1].reason == "no question about this place"
    assert not none.kept


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Asked("What is the code on the red star?", "ocr", "x"), ""),
        (Asked("What is the code on the blue cross?", "ocr", "x"), "not answerable from the crop"),
        (Asked("How many stars are there?", "counting", "x"), "not answerable from the crop"),
        (Asked("How many crosses are there?", "counting", "x"), "a count of the whole picture, which no crop shows"),
        (Asked("Who made it?", "ocr", "x"), "a question that the picture does not know"),
        (Asked("What is written in this crop?", "ocr", "x"), "the question points at the crop or a box"),
        (Asked("Which tag says A4?", "ocr", "x", known="a4"), "the question holds the answer"),
    ],
)
def test_a_question_is_checked(asked: Asked, reason: str) -> None:
    (item,) = ValidateStep(RuleValidator(), StillViews())(dataclasses.replace(ITEM, asked=asked))
    assert item.decisions[-1].reason == reason
    assert item.kept is (reason == "")


def test_a_question_with_two_answers_is_not_unique() -> None:
    twice = Known((*KNOWN.questions, KnownQuestion(ITEM.asked.text, "Z9", ((5, 5, 9, 9),), "code")))
    (item,) = ValidateStep(RuleValidator(), StillViews(twice))(ITEM)
    assert item.decisions[-1].reason == "not unique in the whole picture"
    again = Known((*KNOWN.questions, KnownQuestion(ITEM.asked.text, "a4", ((5, 5, 9, 9),), "code")))
    assert ValidateStep(RuleValidator(), StillViews(again))(ITEM)[0].kept


def test_alternatives_and_closed_answers_may_stand_in_the_question() -> None:
    assert leak("Is the star left or right of the cross?", "left") == ""
    assert leak("Is there no star?", "no") == ""


def test_kinds_come_from_fields_or_words() -> None:
    def kind(text: str, answer: str, field: str = "") -> str:
        return kind_of(KnownQuestion(text, answer, (), field))

    assert kind("anything", "x", "side") == "spatial"
    assert kind("anything", "x", "total") == "ocr"
    assert kind("How many stars?", "3") == "counting"
    assert kind("What colour is it?", "red") == "colour"
    assert kind("Is it open?", "Yes.") == "identification"
    assert kind("What is the date?", "1/2/2024") == "ocr"


def test_the_teacher_that_knows_errs_as_often_as_told_and_always_alike() -> None:
    def answers(rate: float) -> list[str]:
        teacher = RuleTeacher(error_rate=rate)
        return [teacher.answer(ITEM, StillViews(), sample).text for sample in range(400)]

    assert set(answers(0.0)) == {"A4"}
    wrong = [text for text in answers(0.25) if text != "A4"]
    assert 60 <= len(wrong) <= 140
    assert answers(0.25) == answers(0.25)
    unknown = dataclasses.replace(ITEM, asked=dataclasses.replace(ITEM.asked, known=""))
    assert RuleTeacher().answer(unknown, StillViews(), 0).status == "abstained"
