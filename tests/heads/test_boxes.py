import random

import pytest
import torch
from torch import Tensor

from qzoom.config import BoxRule
from qzoom.heads.boxes import MapBox, boxes_from_maps, cells_to_pixels
from qzoom.images.geometry import contains


def cell_pixels(row: int, column: int, grid: tuple[int, int], size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """The original pixels that a cell touches: floor of its start, ceiling of its end."""
    rows, columns = grid
    width, height = size_px
    return (
        column * width // columns,
        row * height // rows,
        -(-(column + 1) * width // columns),
        -(-(row + 1) * height // rows),
    )


def random_case(draw: random.Random) -> tuple[Tensor, tuple[int, int]]:
    rows, columns = draw.randint(1, 14), draw.randint(1, 14)
    generator = torch.Generator().manual_seed(draw.randint(0, 10**9))
    return torch.rand(rows, columns, generator=generator) ** 3, (draw.randint(2, 3000), draw.randint(2, 3000))


def boxes(maps: list[Tensor], sizes: list[tuple[int, int]], level: float, **rule: object) -> tuple[MapBox, ...]:
    return boxes_from_maps(maps, sizes, threshold=level, rule=BoxRule(**rule), token_px=32)


@pytest.mark.parametrize("scaling", ["exact", "float32"])
@pytest.mark.parametrize("components", ["union", "peak_component", "all"])
def test_boxes_lie_inside_the_picture_and_keep_their_least_side(scaling, components):
    draw = random.Random(1)
    found_any = 0
    for _ in range(300):
        grid, size = random_case(draw)
        least = draw.choice([1, 28, 100])
        found = boxes(
            [grid], [size], 0.4, scaling=scaling, components=components, max_regions=5, min_side_px=least,
            margin_cells=draw.choice([0, 0.5, 2]),
        )  # fmt: skip
        found_any += bool(found)
        for item in found:
            assert contains((0, 0, *size), item.box)
            slack = 1 if scaling == "float32" else 0  # float32 cuts to integers and may lose a pixel at each end
            for side, whole in ((item.box[2] - item.box[0], size[0]), (item.box[3] - item.box[1], size[1])):
                assert side >= min(least, whole) - slack
            x0, y0, x1, y1 = item.cells
            assert 0 <= x0 < x1 <= grid.shape[1]
            assert 0 <= y0 < y1 <= grid.shape[0]
        if components != "all":
            assert len(found) == (1 if bool((grid > 0.4).any()) else 0)
    assert found_any > 200


@pytest.mark.parametrize("margin", [0, 0.5, 1.25])
def test_exact_union_covers_every_pixel_of_every_foreground_cell(margin):
    draw = random.Random(2)
    for _ in range(300):
        grid, size = random_case(draw)
        for item in boxes([grid], [size], 0.4, scaling="exact", margin_cells=margin):
            for row, column in (grid > 0.4).nonzero().tolist():
                assert contains(item.box, cell_pixels(row, column, tuple(grid.shape), size))


def test_exact_union_without_margin_is_tight():
    draw = random.Random(3)
    for _ in range(200):
        grid, size = random_case(draw)
        found = boxes([grid], [size], 0.4, scaling="exact", min_side_px=1)
        if found:
            cells = [cell_pixels(r, c, tuple(grid.shape), size) for r, c in (grid > 0.4).nonzero().tolist()]
            assert found[0].box == (
                min(c[0] for c in cells),
                min(c[1] for c in cells),
                max(c[2] for c in cells),
                max(c[3] for c in cells),
            )
            assert found[0].score == float(grid.max())


def test_all_components_cover_the_foreground_with_touching_cells_together():
    draw = random.Random(4)
    for _ in range(200):
        grid, size = random_case(draw)
        found = boxes([grid], [size], 0.4, scaling="exact", components="all", max_regions=64)
        foreground = (grid > 0.4).nonzero().tolist()
        for row, column in foreground:
            cell = cell_pixels(row, column, tuple(grid.shape), size)
            assert any(contains(item.box, cell) for item in found)
            near = [(r, c) for r, c in foreground if max(abs(r - row), abs(c - column)) == 1]
            for r, c in near:
                both = [cell, cell_pixels(r, c, tuple(grid.shape), size)]
                assert any(all(contains(item.box, b) for b in both) for item in found)
        scores = [item.score for item in found]
        assert scores == sorted(scores, reverse=True)
        few = boxes([grid], [size], 0.4, scaling="exact", components="all", max_regions=2)
        assert few == found[:2]
        best = boxes([grid], [size], 0.4, scaling="exact", components="peak_component")
        assert best == found[:1]


def test_components_by_hand():
    grid = torch.tensor(
        [
            [0.9, 0.0, 0.0, 0.0],
            [0.0, 0.8, 0.0, 0.6],
            [0.0, 0.0, 0.0, 0.7],
        ]
    )
    found = boxes([grid], [(400, 300)], 0.5, scaling="exact", components="all", max_regions=3)
    assert [(item.box, round(item.score, 4)) for item in found] == [
        ((0, 0, 200, 200), 0.9),
        ((300, 100, 400, 300), 0.7),
    ]
    assert boxes([grid], [(400, 300)], 0.5)[0].box == (0, 0, 400, 300)
    wider = boxes([grid], [(400, 300)], 0.65, scaling="exact", components="peak_component", margin_cells=0.5)
    assert wider[0].box == (0, 0, 250, 250)
    assert wider[0].cells == (0, 0, 2.5, 2.5)


def test_thresholds_and_the_picture_of_the_peak():
    grid = torch.tensor([[0.5, 0.25, 0.2]])
    assert boxes([grid], [(300, 100)], 0.5) == ()
    assert boxes([grid], [(300, 100)], 0.49)[0].cells == (0, 0, 1, 1)
    assert boxes([grid], [(300, 100)], 0.45, threshold="relative")[0].cells == (0, 0, 2, 1)
    assert boxes([grid * 1e-3], [(300, 100)], 0.45, threshold="relative")[0].cells == (0, 0, 2, 1)
    assert boxes([grid], [(300, 100)], 0.45, threshold="relative", min_peak=0.5) == ()
    assert boxes([torch.zeros(3, 3)], [(300, 100)], 0.0, threshold="relative") == ()
    assert boxes([torch.zeros(3, 3)], [(300, 100)], 0.0) == ()
    assert boxes([], [], 0.1) == ()
    low, high = torch.tensor([[0.6, 0.1]]), torch.tensor([[0.1], [0.7]])
    sizes = [(200, 100), (100, 200)]
    assert boxes([low, high], sizes, 0.5) == (MapBox(1, (0, 1, 1, 2), (0, 100, 100, 200), pytest.approx(0.7)),)
    both = boxes([low, high], sizes, 0.5, components="all", max_regions=4)
    assert [item.image for item in both] == [1, 0]
    relative = boxes([low, high], sizes, 0.9, components="all", max_regions=4, threshold="relative")
    assert [item.image for item in relative] == [1]


def test_a_small_box_grows_about_its_centre_and_slides_back_inside():
    def one(cells: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        return cells_to_pixels(cells, (20, 20), (200, 200), min_side_px=28, scaling="exact")

    assert one((10, 10, 11, 11)) == (91, 91, 119, 119)
    assert one((0, 0, 1, 1)) == (0, 0, 28, 28)
    assert one((19, 0, 20, 1)) == (172, 0, 200, 28)
    tiny = cells_to_pixels((0, 0, 1, 1), (2, 2), (10, 12), min_side_px=28, scaling="exact")
    assert tiny == (0, 0, 10, 12)


def test_float32_scaling_stays_within_a_pixel_of_exact():
    draw = random.Random(5)
    lost = 0
    for _ in range(2000):
        rows, columns = draw.randint(1, 40), draw.randint(1, 40)
        size = (draw.randint(100, 4000), draw.randint(100, 4000))
        x0, y0 = draw.randrange(columns), draw.randrange(rows)
        cells = (x0, y0, draw.randint(x0 + 1, columns), draw.randint(y0 + 1, rows))
        loose = cells_to_pixels(cells, (rows, columns), size, scaling="float32", token_px=32)
        exact = cells_to_pixels(cells, (rows, columns), size, scaling="exact")
        assert max(abs(a - b) for a, b in zip(loose, exact, strict=True)) <= 1
        lost += loose != exact
    assert lost > 0
