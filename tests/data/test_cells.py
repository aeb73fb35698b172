import numpy as np
import pytest

from qzoom.data.cells import AREA_BINS, area_bin, area_share, around, covered_cells


def test_covered_cells_by_hand():
    # 80 x 40 px as 2 rows of 4 cells, 20 px each: the box takes half of one cell and a quarter of the next
    found = covered_cells([(10, 0, 25, 20)], (80, 40), (2, 4))
    assert found == pytest.approx(np.array([[0.5, 0.25, 0, 0], [0, 0, 0, 0]]))
    assert found.mean() == pytest.approx(15 * 20 / (80 * 40))
    found = covered_cells([(15, 15, 25, 30)], (40, 40), (2, 2))
    assert found == pytest.approx(np.array([[25, 25], [50, 50]]) / 400)
    one = covered_cells([(0, 0, 20, 20), (10, 10, 20, 20)], (40, 40), (2, 2))
    assert one == pytest.approx(np.array([[1.0, 0], [0, 0]]))
    two = covered_cells([(0, 0, 15, 20), (5, 0, 20, 10)], (40, 40), (2, 2))
    assert two[0, 0] == pytest.approx((15 * 20 + 5 * 10) / 400)
    found = covered_cells([(0, 0, 10, 10)], (30, 10), (1, 2))
    assert found == pytest.approx(np.array([[10 / 15, 0]]))
    assert covered_cells([(3, 1, 17, 9), (20, 0, 29, 4)], (31, 11), (3, 7)).sum() == pytest.approx(
        (14 * 8 + 9 * 4) / (31 * 11) * 21
    )
    assert covered_cells([(50, 50, 60, 60)], (40, 40), (2, 2)).sum() == 0
    assert covered_cells([(30, 30, 90, 90)], (40, 40), (2, 2)) == pytest.approx(np.array([[0, 0], [0, 0.25]]))
    assert covered_cells([], (40, 40), (2, 2)).sum() == 0


def test_boxes_around_and_their_share():
    assert around([(10, 20, 30, 40), (5, 25, 12, 90)]) == (5, 20, 30, 90)
    assert around([(1, 2, 3, 4)]) == (1, 2, 3, 4)
    assert area_share([(0, 0, 10, 10)], (100, 50)) == 0.02
    assert area_share([(0, 0, 10, 10), (90, 40, 100, 50)], (100, 50)) == 1.0
    assert area_share([(90, 40, 300, 300)], (100, 50)) == 0.02  # what lies outside does not count
    assert area_share([(0, 0, 10, 10)], (0, 0)) == 0.0


@pytest.mark.parametrize(
    ("share", "name"),
    [
        (0, "<0.1%"), (0.0009, "<0.1%"), (0.001, "0.1-0.3%"), (0.0299, "1-3%"), (0.05, "3-10%"), (0.1, ">=10%"),
        (1, ">=10%"),
    ],
)  # fmt: skip
def test_bins(share, name):
    assert area_bin(share) == name
    assert name in AREA_BINS
