"""Ranking of heads and cells of boxes, against hand-computed values."""

from __future__ import annotations

import pytest
import torch

from qzoom.engine.attention import ResponseAttention
from qzoom.labels.attention import cells_of_boxes, rank_heads


def test_cells_of_boxes_are_all_that_are_touched():
    cells = cells_of_boxes([(10, 0, 21, 10)], (40, 20), (2, 4))
    assert cells.tolist() == [[False, True, True, False], [False, False, False, False]]


def test_a_box_that_ends_on_a_border_does_not_touch_the_next_cell():
    assert cells_of_boxes([(0, 0, 10, 10)], (40, 20), (2, 4)).sum() == 1


def test_the_pointing_head_comes_first():
    inside = torch.tensor([[True, False], [False, False]])
    points = torch.tensor([[0.6, 0.1], [0.1, 0.1]])
    spread = torch.full((2, 2), 0.2)
    astray = torch.tensor([[0.1, 0.7], [0.1, 0.1]])
    attention = ResponseAttention(torch.stack([torch.stack([astray, points]), torch.stack([spread, astray])]), (3, 5))
    ranked = rank_heads([(attention, inside), (attention, inside)])
    assert (ranked[0].layer, ranked[0].head) == (3, 1)
    assert ranked[0].hit == 1.0
    assert ranked[0].lift == pytest.approx(0.6 / 0.9 / 0.25)
    assert ranked[-1].hit == 0.0


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="without samples"):
        rank_heads([])
