"""Agreed answers beside the ones that pictures know."""

import dataclasses

from qzoom.distill.card import Totals
from qzoom.distill.items import Picture
from tests.distill.items import finished_item

PICTURE = Picture("0" * 20, "scenes:1", 100, 80, "", "scenes")


def item(answer, known, **parts):
    made = finished_item(PICTURE, answer=answer, **parts)
    return dataclasses.replace(made, asked=dataclasses.replace(made.asked, known=known))


def test_agreed_answers_are_compared_with_known_ones():
    totals = Totals()
    for one in (
        item("K7", "k7"),
        item("K7", "K9"),
        item("K7", ""),
        item("none", "K7", negative=True),
        item("red", "Red.", kind="colour"),
    ):
        totals.add_kept(one)
    assert totals.to_dict()["known"] == {"colour": {"agreed": 1, "right": 1}, "ocr": {"agreed": 2, "right": 1}}
