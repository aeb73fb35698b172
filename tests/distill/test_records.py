"""The pipeline's record: there and back, its name, its decisions."""

from __future__ import annotations

import dataclasses

import pytest

from qzoom.distill.items import Agreement, Asked, Choices, Item, Picture, Region, Vote, item_from_json
from qzoom.errors import DataError

PICTURE = Picture("a" * 20, "dogs/1.png", 400, 200, "/data", "own")
REGION = Region((40, 20, 80, 40), (36, 18, 84, 42), "given", 2.0, 0.5, "tag", 1)
ITEM = Item(
    PICTURE,
    REGION,
    Asked("What does the tag say?", "ocr", "rule"),
    (Vote("one", 0, "A4"), Vote("two", 0, "", "failed", "HTTP 500")),
    Agreement("A4", 1, 1, (("one", 1),)),
    Choices(("A4", "B7"), "A", "rule"),
    models=(("teacher", "one@1234"),),
)


def test_an_item_survives_its_line() -> None:
    assert item_from_json(ITEM.to_json(), "items.jsonl:1") == ITEM


def test_its_name_is_what_it_is_about() -> None:
    moved = dataclasses.replace(ITEM, picture=dataclasses.replace(PICTURE, source="other/1.png"), votes=())
    other = dataclasses.replace(ITEM, asked=dataclasses.replace(ITEM.asked, text="What colour is the tag?"))
    assert moved.id == ITEM.id
    assert len({ITEM.id, other.id, Item(PICTURE).id, Item(PICTURE, REGION).id}) == 4


def test_areas_are_shares_of_the_picture() -> None:
    assert REGION.area_share(PICTURE) == 0.01
    assert REGION.normalised(PICTURE) == (0.1, 0.1, 0.2, 0.2)


def test_one_refusal_is_enough() -> None:
    refused = ITEM.decide("validate", True).decide("vote", False, "two of eight agree").decide("choices", True)
    assert ITEM.kept
    assert not refused.kept
    assert [decision.step for decision in refused.decisions] == ["validate", "vote", "choices"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "items.jsonl:3: not valid JSON"),
        ("[]", "items.jsonl:3: expected an object, not list"),
        ('{"schema": 9}', "items.jsonl:3: items of schema 9"),
        (ITEM.to_json().replace('"votes"', '"voices"'), "unknown field 'voices'"),
        (ITEM.to_json().replace('"answered"', '"maybe"'), "must be one of answered, abstained, failed"),
    ],
)
def test_a_broken_line_says_what_and_where(line: str, sentence: str) -> None:
    with pytest.raises(DataError, match=None) as failure:
        item_from_json(line, "items.jsonl:3")
    assert sentence in str(failure.value)
