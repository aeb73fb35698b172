import dataclasses
import json

import pytest

from qzoom.distill.items import (
    Agreement,
    Choices,
    ImageRef,
    Item,
    QuestionDraft,
    TargetRegion,
    Vote,
    apply,
    item_from_values,
)
from qzoom.errors import CheckpointError, ConfigError, DataError, ImageError, LaterError, StopRunError

PICTURE = ImageRef("a" * 20, "dogs/1.png", 400, 200, "/data", "own")
REGION = TargetRegion((40, 20, 80, 40), (36, 18, 84, 42), "given", 2.0, 0.5, "tag", 1)
ITEM = Item(
    PICTURE,
    REGION,
    QuestionDraft("What does the tag say?", "ocr", "rule"),
    (Vote("one", 0, "A4"), Vote("two", 0, "", "failed", "HTTP 500")),
    Agreement("A4", 1, 1, (("one", 1),)),
    Choices(("A4", "B7"), "A", "rule"),
    models=(("teacher", "one@1234"),),
)


def test_an_item_survives_its_line_and_is_named_by_what_it_is_about():
    assert item_from_values(json.loads(ITEM.to_json()), "items.jsonl:1") == ITEM
    moved = dataclasses.replace(ITEM, picture=dataclasses.replace(PICTURE, source="other/1.png"), votes=())
    other = dataclasses.replace(ITEM, draft=dataclasses.replace(ITEM.draft, text="What colour is the tag?"))
    assert moved.id == ITEM.id
    assert len({ITEM.id, other.id, Item(PICTURE).id, Item(PICTURE, REGION).id}) == 4
    assert REGION.area_share(PICTURE) == 0.01
    assert REGION.normalised(PICTURE) == (0.1, 0.1, 0.2, 0.2)
    refused = ITEM.decide("validate").decide("vote", "two of eight agree").decide("choices")
    assert ITEM.kept
    assert not refused.kept
    assert [decision.step for decision in refused.decisions] == ["validate", "vote", "choices"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("[]", "items.jsonl:3: expected an object, not list"),
        ('{"schema": 9}', "items.jsonl:3: items of schema 9"),
        (ITEM.to_json().replace('"votes"', '"voices"'), "unknown field 'voices'"),
        (ITEM.to_json().replace('"answered"', '"maybe"'), "must be one of answered, abstained, failed"),
    ],
)
def test_a_broken_line_says_what_and_where(line, sentence):
    with pytest.raises(DataError, match=None) as failure:
        item_from_values(json.loads(line), "items.jsonl:3")
    assert sentence in str(failure.value)


PLAIN = Item(ImageRef("0" * 20, "x", 100, 100), TargetRegion((1, 1, 9, 9), (0, 0, 10, 10), "given"))


class Scripted:
    """Gives the items, or raises the error, and counts the calls."""

    def __init__(self, what):
        self.what = what
        self.calls = 0

    def __call__(self, item):
        self.calls += 1
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


def test_refused_items_go_through_untouched_and_unseen():
    step = Scripted(())
    refused = PLAIN.decide("crop", "too small")
    assert apply("ask", step, refused) == (refused,)
    assert step.calls == 0


@pytest.mark.parametrize("error", [DataError("no region"), ImageError("cannot be decoded")])
def test_an_item_that_cannot_be_used_is_refused_with_the_sentence(error):
    (item,) = apply("ask", Scripted(error), PLAIN)
    assert (item.kept, item.decisions[-1].step, item.decisions[-1].reason) == (False, "ask", str(error))


@pytest.mark.parametrize(
    "error", [StopRunError("spent"), LaterError("not now"), ConfigError("wrong"), CheckpointError("none")]
)
def test_what_concerns_the_run_gets_out(error):
    with pytest.raises(type(error), match=str(error)):
        apply("ask", Scripted(error), PLAIN)


def test_of_equal_items_only_the_first_stays():
    draft = [dataclasses.replace(PLAIN, draft=QuestionDraft(text, "ocr", "r")) for text in ("a", "b", "a")]
    made = apply("ask", Scripted((draft[0].decide("ask", "no"), *draft)), PLAIN)
    assert [item.kept for item in made] == [False, True, True, False]
    assert made[3].decisions[-1].reason == "the same as another item of this picture"
