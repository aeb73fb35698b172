"""The arithmetic of which boxes are kept."""

import pytest

from qzoom.distill.select import SelectSettings, area_bin, iou, select
from qzoom.errors import ConfigError

SIZE = (1000, 1000)


def reasons(boxes, scores=None, **settings):
    return [reason for _, _, reason in select(boxes, scores or [1.0] * len(boxes), SIZE, SelectSettings(**settings))]


def box(x, y, width, height):
    return x, y, x + width, y + height


def test_each_limit_has_its_reason():
    boxes = [
        box(0, 0, 100, 100),
        box(0, 0, 400, 400),
        box(500, 500, 2, 2),
        box(500, 500, 11, 200),
        box(500, 100, 20, 20),
        box(100, 700, 800, 20),
        box(1200, 0, 50, 50),
        box(950, 950, 100, 100),
    ]
    assert reasons(boxes, min_share=1e-5, max_share=0.1, min_side_px=12) == [
        "",
        "larger than the area band",
        "smaller than the area band",
        "too few pixels",
        "too few visual tokens",
        "too long and thin",
        "outside the picture",
        "",
    ]


def test_clipped_box_is_what_is_kept():
    ((clipped, _, reason),) = select([(950, -20, 1100, 60)], [1.0], SIZE, SelectSettings())
    assert (clipped, reason) == ((950, 0, 1000, 60), "")


def test_of_overlapping_boxes_the_better_stays():
    boxes = [box(0, 0, 100, 100), box(10, 0, 100, 100), box(60, 0, 100, 100)]
    assert reasons(boxes, [0.5, 0.9, 0.4]) == ["overlaps a better one", "", ""]
    assert reasons(boxes) == ["", "overlaps a better one", ""]


def test_bins_are_filled_in_turn_up_to_the_picture_s_share():
    small = [box(100 * n, 0, 30, 30) for n in range(5)]
    large = [box(300 * n, 300, 280, 280) for n in range(3)]
    found = reasons(small + large, min_share=5e-4, bins=2, per_bin=3, per_picture=4)
    assert found == [
        "",
        "",
        "enough of this picture",
        "enough of its size",
        "enough of its size",
        "",
        "",
        "enough of this picture",
    ]


def test_bins_have_equal_ratios():
    settings = SelectSettings(min_share=1e-4, max_share=1e-1, bins=3)
    sides = (10, 31, 32, 99, 101, 316)
    assert [area_bin(box(0, 0, side, side), SIZE, settings) for side in sides] == [0, 0, 1, 1, 2, 2]


def test_iou_by_hand():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_a_band_without_room_is_refused():
    with pytest.raises(ConfigError, match="leaves no room"):
        SelectSettings(min_share=0.2, max_share=0.1)
