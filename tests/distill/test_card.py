import dataclasses

from qzoom.distill.card import Stats
from qzoom.distill.items import ImageRef
from tests.distill.views import finished_item

PICTURE = ImageRef("0" * 20, "scenes:1", 100, 80, "", "scenes")


def item(answer, known, **parts):
    made = finished_item(PICTURE, answer=answer, **parts)
    return dataclasses.replace(made, draft=dataclasses.replace(made.draft, known=known))


def test_agreed_answers_are_compared_with_known_ones():
    stats = Stats()
    for one in (
        item("K7", "k7"),
        item("K7", "K9"),
        item("K7", ""),
        item("none", "K7", negative=True),
        item("red", "Red.", kind="colour"),
    ):
        stats.add_kept(one)
    assert stats.to_dict()["known"] == {"colour": {"agreed": 1, "right": 1}, "ocr": {"agreed": 2, "right": 1}}
