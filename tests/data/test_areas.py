"""Areas and their bins, worked out by hand."""

import pytest

from qzoom.data.cells import AREA_BINS, area_bin, area_share, around


def test_around_all_boxes():
    assert around([(10, 20, 30, 40), (5, 25, 12, 90)]) == (5, 20, 30, 90)
    assert around([(1, 2, 3, 4)]) == (1, 2, 3, 4)


def test_share_of_the_box_around():
    assert area_share([(0, 0, 10, 10)], (100, 50)) == 0.02
    assert area_share([(0, 0, 10, 10), (90, 40, 100, 50)], (100, 50)) == 1.0
    assert area_share([(90, 40, 300, 300)], (100, 50)) == 0.02  # what lies outside does not count
    assert area_share([(0, 0, 10, 10)], (0, 0)) == 0.0


@pytest.mark.parametrize(
    ("share", "name"),
    [
        (0, "<0.1%"),
        (0.0009, "<0.1%"),
        (0.001, "0.1-0.3%"),
        (0.0299, "1-3%"),
        (0.05, "3-10%"),
        (0.1, ">=10%"),
        (1, ">=10%"),
    ],
)
def test_bins(share, name):
    assert area_bin(share) == name
    assert name in AREA_BINS
