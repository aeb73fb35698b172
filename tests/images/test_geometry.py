import itertools
import random

import pytest

from qzoom.config import TokenBudget
from qzoom.errors import ImageError
from qzoom.images.geometry import box_area_px, clip_box, contains, fit_grid, iou, scale_box

SIZES = [
    (600, 1200), (1200, 2400), (1000, 1000), (28, 28), (1, 1), (17, 900), (4000, 30), (333, 777), (64, 63), (2, 400),
]  # fmt: skip
BUDGETS = [(1, 1), (1, 2), (4, 16), (64, 144), (144, 144), (140, 147), (16, 16384), (256, 576), (1, 576), (7, 7)]


def processor_grid(width, height, cell, budget):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    area = cell * cell
    h, w = smart_resize(height, width, cell, budget.min_tokens * area, budget.max_tokens * area)
    return h // cell, w // cell


@pytest.mark.parametrize("token_px", [28, 32])
def test_grid_equals_the_processor_within_the_limits(token_px):
    draw = random.Random(5)
    sizes = SIZES + [(draw.randint(2, 3000), draw.randint(2, 3000)) for _ in range(400)]
    agreed = 0
    for (width, height), limits in itertools.product(sizes, BUDGETS):
        if max(width, height) > 200 * min(width, height):
            continue
        budget = TokenBudget(*limits)
        expected = processor_grid(width, height, token_px, budget)
        if limits[0] <= expected[0] * expected[1] <= limits[1]:
            agreed += 1
            assert fit_grid(width, height, token_px, budget) == expected, (width, height, limits)
    assert agreed > 2500


def test_grid_never_leaves_the_limits():
    draw = random.Random(7)
    sizes = SIZES + [(draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(300)]
    for (width, height), limits in itertools.product(sizes, BUDGETS):
        rows, columns = fit_grid(width, height, 28, TokenBudget(*limits))
        assert rows >= 1
        assert columns >= 1
        assert limits[0] <= rows * columns <= limits[1], (width, height, limits)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((280, 560), (1, 10_000), (20, 10)),  # native
        ((2800, 28), (1, 50), (1, 50)),  # a strip of 100 cells in 50
        ((28, 2800), (1, 50), (50, 1)),
        ((1000, 1000), (7, 7), (1, 7)),  # a prime number of tokens
        ((1000, 1010), (140, 147), (12, 12)),
        ((1, 1), (4, 4), (2, 2)),
    ],
)
def test_grid_values(size, limits, expected):
    assert fit_grid(*size, 28, TokenBudget(*limits)) == expected


def test_grid_refuses_no_pixels():
    with pytest.raises(ImageError, match="0 x 5 px"):
        fit_grid(0, 5, 28, TokenBudget(1, 4))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-5, 2, 20, 8), (0, 2, 10, 8)),
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((11, 3, 15, 5), (10, 3, 10, 5)),
        ((-9, -9, -2, -2), (0, 0, 0, 0)),
        ((8, 9, 3, 4), (8, 9, 8, 9)),
    ],
)
def test_clip_box(box, expected):
    assert clip_box(box, (10, 9)) == expected


def test_areas_containment_and_scaling():
    assert box_area_px((1, 2, 4, 6)) == 12
    assert box_area_px((4, 6, 1, 2)) == 0
    assert contains((0, 0, 10, 10), (0, 0, 10, 10))
    assert not contains((0, 0, 10, 10), (0, 0, 10, 11))
    assert not contains((0, 0, 10, 10), (3, 3, 3, 5))
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    draw = random.Random(1)
    for _ in range(200):
        first, second = (
            (x, y, x + draw.randint(0, 6), y + draw.randint(0, 6))
            for x, y in [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(2)]
        )
        shared = sum(
            all(b[0] <= x < b[2] and b[1] <= y < b[3] for b in (first, second)) for x in range(13) for y in range(13)
        )
        assert contains(first, second) == (shared == box_area_px(second) > 0)
    assert scale_box((1, 1, 3, 3), (10, 10), (5, 5)) == (0, 0, 2, 2)
    assert scale_box((0, 0, 1000, 700), (1000, 700), (333, 199)) == (0, 0, 333, 199)
    assert scale_box((2, 4, 6, 8), (10, 10), (20, 30)) == (4, 12, 12, 24)
