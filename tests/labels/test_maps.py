import numpy as np
import pytest

from qzoom.data.cells import cells_touched, picture_in_square
from qzoom.errors import ConfigError, DataError
from qzoom.labels.maps import region_labels
from qzoom.labels.settings import LabelMapSettings

NO_SINKS = np.zeros((6, 6), dtype=np.float32)
DONT_KNOW = -100


def spot(values: dict[tuple[int, int], float], size: int = 6) -> np.ndarray:
    out = np.zeros((size, size), dtype=np.float32)
    for cell, value in values.items():
        out[cell] = value
    return out


def test_three_states_sinks_and_thresholds():
    grounding = spot({(2, 2): 0.9, (2, 3): 0.3, (0, 5): 0.2, (5, 5): 0.01})
    found = region_labels(NO_SINKS, grounding)
    assert found.usable
    assert found.box == (1, 1, 5, 4)
    expected = np.zeros((6, 6), dtype=np.int64)
    expected[1:4, 1:5] = DONT_KNOW  # inside the box, not foreground
    expected[2, 2:4] = 1
    expected[0, 5] = DONT_KNOW  # outside, but not weak enough
    np.testing.assert_array_equal(found.labels, expected)
    assert found.labels.dtype == np.int64
    grounding = spot({(2, 2): 0.2, (5, 5): 0.9})
    sinks = spot({(5, 5): 0.01, (1, 1): 0.5})
    found = region_labels(sinks, grounding)
    assert found.labels[2, 2] == 1
    assert found.labels[5, 5] == 0
    assert found.labels[1, 1] == DONT_KNOW
    grounding = spot({(2, 2): 0.8, (2, 3): 0.2})
    assert region_labels(NO_SINKS, grounding).labels[2, 3] == DONT_KNOW
    assert region_labels(NO_SINKS, grounding, LabelMapSettings(foreground=0.2)).labels[2, 3] == 1


@pytest.mark.parametrize(
    ("width", "box"), [(0, (2, 2, 3, 3)), (1, (2, 2, 3, 3)), (2, (1, 1, 4, 4)), (3, (1, 1, 4, 4)), (4, (0, 0, 5, 5))]
)
def test_blur_width(width, box):
    settings = LabelMapSettings(blur_cells=width, ignore_share=1.0)
    assert region_labels(NO_SINKS, spot({(2, 2): 0.9}), settings).box == box


def test_wide_weak_and_empty_maps_are_unusable():
    wide = region_labels(NO_SINKS, spot({(1, 0): 0.9, (1, 5): 0.9}))  # 3 of 6 rows, all columns
    assert not wide.usable
    assert (wide.labels == DONT_KNOW).all()
    assert region_labels(NO_SINKS, spot({(1, 0): 0.9, (1, 3): 0.9})).usable
    weak = region_labels(NO_SINKS, spot({(2, 2): 0.004}))
    assert not weak.usable
    assert weak.box == (1, 1, 4, 4)
    empty = region_labels(NO_SINKS, NO_SINKS)
    assert not empty.usable
    assert empty.box == (0, 0, 6, 6)
    assert not region_labels(spot({(2, 2): 1.0}), spot({(2, 2): 0.9})).usable


def test_padding_is_background_and_never_foreground():
    grounding = spot({(0, 0): 0.9, (2, 2): 0.3, (1, 1): 0.0})
    found = region_labels(NO_SINKS, grounding, padded_from_px=(600, 200))  # rows 2 and 3 show the picture
    assert found.labels[2, 2] == 1
    assert (found.labels[:2] == 0).all()
    assert (found.labels[4:] == 0).all()
    assert found.labels[3, 2] == DONT_KNOW
    assert picture_in_square((600, 200), 6) == (0, 2, 6, 4)
    assert picture_in_square((200, 600), 6) == (2, 0, 4, 6)
    assert picture_in_square((500, 500), 7) == (0, 0, 7, 7)
    assert picture_in_square((3000, 10), 16) == (0, 7, 16, 9)
    assert picture_in_square((3000, 10), 17) == (0, 8, 17, 9)


def test_cells_touched_and_bad_input():
    cells = cells_touched([(10, 0, 21, 10)], (40, 20), (2, 4), "dynamic")
    assert cells.tolist() == [[False, True, True, False], [False, False, False, False]]
    assert cells_touched([(0, 0, 10, 10)], (40, 20), (2, 4), "dynamic").sum() == 1
    with pytest.raises(DataError, match="one shape"):
        region_labels(NO_SINKS, np.zeros((6, 5)))
    with pytest.raises(DataError, match="not square"):
        region_labels(np.zeros((4, 6)), np.zeros((4, 6)), padded_from_px=(10, 20))
    with pytest.raises(DataError, match="not finite"):
        region_labels(NO_SINKS, np.full((6, 6), np.nan))
    with pytest.raises(DataError, match="no content"):
        picture_in_square((0, 10), 4)
    with pytest.raises(ConfigError, match="foreground"):
        LabelMapSettings(foreground=1.5)
