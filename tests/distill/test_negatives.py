"""Absent things, on facts written out and on drawn pictures."""

from __future__ import annotations

import dataclasses

import pytest

from qzoom.distill.choices import absent
from qzoom.distill.items import Agreement, Asked, Item, Known, KnownObject, KnownQuestion, KnownText
from qzoom.distill.pictures import load_source
from tests.distill.views import ITEM, KNOWN


def item(text: str, answer: str = "x", seed: int = 0) -> Item:
    return dataclasses.replace(
        ITEM, asked=Asked(text, "ocr", "rule", known=answer), answer=Agreement(answer, 6, 8, ()), seed=seed
    )


def known(text: str, answer: str, field: str, printed: str = "") -> Known:
    things = (KnownObject("red", "star", (0, 0, 9, 9)), KnownObject("blue", "cross", (20, 0, 29, 9)))
    lines = (KnownText(printed, (0, 0, 9, 9)),) if printed else ()
    return Known((KnownQuestion(text, answer, ((0, 0, 9, 9),), field),), () if printed else things, lines)


def test_a_yes_becomes_a_no_and_a_count_becomes_zero() -> None:
    text = "Is there a red star?"
    no = absent(item(text, "yes"), known(text, "yes", "exists"))
    assert no is not None
    assert (no.asked.text != text, no.answer.text) == (True, "no")
    text = "How many crosses are there?"
    zero = absent(item(text, "1"), known(text, "1", "count"))
    assert zero is not None
    assert zero.asked.text in {f"How many {s} are there?" for s in ("circles", "squares", "triangles", "diamonds")}
    assert zero.answer.text == "0"


def test_items_and_labels_are_exchanged_for_some_that_are_not_printed() -> None:
    text = "What is the price of HOT TEA?"
    price = absent(item(text, "3.50"), known(text, "3.50", "price", "HOT TEA"))
    assert price is not None
    assert price.asked.text.startswith("What is the price of ")
    assert "HOT TEA" not in price.asked.text
    text = "What is the member id?"
    value = absent(item(text, "123"), known(text, "123", "value", "Member ID: 123"))
    assert value is not None
    assert value.asked.text.startswith("What is the ")
    assert "member id" not in value.asked.text
    assert (price.answer.text, value.answer.text) == ("none", "none")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("What is the total?", known("What is the total?", "3", "total", "TOTAL")),
        ("Is the red star left of the blue cross?", known("Is the red star left of the blue cross?", "yes", "side")),
        ("What is the date?", Known()),
    ],
)
def test_what_names_nothing_has_no_negative(text: str, facts: Known) -> None:
    assert absent(item(text), facts) is None


def test_the_negative_is_the_items_own() -> None:
    made = [absent(item("What is the code on the red star?", "A4", seed), KNOWN) for seed in range(30)]
    assert len({one.asked.text for one in made if one}) > 5
    assert absent(item("What is the code on the red star?", "A4", 3), KNOWN) == made[3]
    first = made[0]
    assert first is not None
    assert first.asked.pair == item("What is the code on the red star?", "A4").id
    assert (first.asked.negative, first.votes, first.answer.by) == (True, (), "rule")


@pytest.mark.parametrize("source", ["scenes:5", "documents:11"])
def test_drawn_pictures_never_have_what_a_negative_asks_for(source: str) -> None:
    facts = load_source(source, "").known
    printed = [line.text.casefold() for line in facts.texts]
    made = 0
    for question in facts.questions:
        negative = absent(item(question.text, question.answer), facts)
        if negative is None:
            continue
        made += 1
        asked = negative.asked.text
        assert asked != question.text
        for thing in facts.objects:
            assert f"{thing.colour} {thing.shape}" not in asked
        if question.field in ("price", "cell"):
            name = asked.rsplit(" of ", 1)[-1].rstrip("?").casefold()
            assert not any(name in line for line in printed)
    assert made >= 2
