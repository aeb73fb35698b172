"""Kept items come back in one order, whatever order they came in."""

import random

from qzoom.distill.items import Picture
from qzoom.distill.kept import KeptItems
from tests.distill.items import finished_item


def test_order_is_by_picture_and_id_and_equal_items_come_once(tmp_path):
    items = [
        finished_item(Picture(f"{picture:020x}", f"{picture}.png", 50, 50), text=f"Wie heißt {n}?")
        for picture in (3, 1, 2)
        for n in range(4)
    ]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(items)
        with KeptItems(tmp_path / "kept.tmp") as kept:
            for item in (*items, items[0]):
                kept.add(item)
            found.append(list(kept.in_order()))
    assert found[0] == found[1] == found[2]
    assert found[0] == sorted(items, key=lambda one: (one.picture.digest, one.id))
    assert not (tmp_path / "kept.tmp").exists()
