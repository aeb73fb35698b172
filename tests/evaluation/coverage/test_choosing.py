"""The held-out choice: what one half picks, the other half reports."""

import numpy as np
import pytest

from qzoom.errors import DataError
from qzoom.evaluation.coverage import choose, choosing_half, depth

PICTURES = ["a", "a", "b", "c", "d"]


def test_pictures_stay_together():
    half = choosing_half(PICTURES)
    assert half[0] == half[1]
    names = {name for name, chosen in zip(PICTURES, half, strict=True) if chosen}
    assert len(names) == 2
    assert (choosing_half(PICTURES[::-1])[::-1] == half).all()
    with pytest.raises(DataError, match="two pictures"):
        choosing_half(["a", "a"])


def test_the_other_half_reports():
    half = choosing_half(PICTURES)
    values = np.ones((5, 2, 2, 3))  # questions, figures, layers, heads + mean
    values[half, 0, 1, 0] = 9.0  # looks good where it is chosen
    values[~half, 0, 1, 0] = 0.5  # and is not
    values[~half, 0, 0, 1] = 99.0
    found = choose(values, PICTURES, of_heads=True)
    assert (found.layer, found.head, found.depth) == (1, 0, 1.0)
    assert (found.lift, found.lift_when_chosen, found.lift_interval) == (0.5, 9.0, (0.5, 0.5))
    assert found.hit == 1.0
    values[half, 0, 0, 2] = 3.0
    values[~half, 0, 0, 2] = 2.0
    layer = choose(values, PICTURES, of_heads=False)
    assert (layer.layer, layer.head, layer.lift, layer.lift_when_chosen) == (0, None, 2.0, 3.0)


def test_depth():
    assert (depth(23, 36), depth(35, 36)) == (24 / 36, 1.0)
