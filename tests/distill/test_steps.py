"""How one item's trouble stays its own, and what ends a run."""

import dataclasses

import pytest

from qzoom.distill.items import Asked, Item, Picture, Region, Step, apply
from qzoom.errors import CheckpointError, ConfigError, DataError, ImageError, LaterError, StopRunError

ITEM = Item(Picture("0" * 20, "x", 100, 100), Region((1, 1, 9, 9), (0, 0, 10, 10), "given"))


class Scripted:
    name = "ask"

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
    assert isinstance(step, Step)
    refused = ITEM.decide("crop", False, "too small")
    assert apply(step, refused) == (refused,)
    assert step.calls == 0


@pytest.mark.parametrize("error", [DataError("no region"), ImageError("cannot be decoded")])
def test_an_item_that_cannot_be_used_is_refused_with_the_sentence(error):
    (item,) = apply(Scripted(error), ITEM)
    assert (item.kept, item.decisions[-1].step, item.decisions[-1].reason) == (False, "ask", str(error))


@pytest.mark.parametrize(
    "error", [StopRunError("spent"), LaterError("not now"), ConfigError("wrong"), CheckpointError("none")]
)
def test_what_concerns_the_run_gets_out(error):
    with pytest.raises(type(error), match=str(error)):
        apply(Scripted(error), ITEM)


def test_of_equal_items_only_the_first_stays():
    asked = [dataclasses.replace(ITEM, asked=Asked(text, "ocr", "r")) for text in ("a", "b", "a")]
    made = apply(Scripted((asked[0].decide("ask", False, "no"), *asked)), ITEM)
    assert [item.kept for item in made] == [False, True, True, False]
    assert made[3].decisions[-1].reason == "the same as another item of this picture"
