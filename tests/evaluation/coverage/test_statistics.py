"""Relative maps, lift and pointing, worked out by hand."""

import numpy as np
import pytest

from qzoom.evaluation.coverage import lift, pointing, relative, release_ratio, scores


def test_relative_takes_out_what_is_always_there():
    question, generic = np.array([[0.4, 0.1], [0.1, 0.1]]), np.array([[0.4, 0.1], [0.05, 0.1]])
    assert relative(question, generic, 0.0) == pytest.approx(np.array([[1, 1], [2, 1]]))


def test_the_guard_keeps_empty_cells_finite():
    generic = np.array([[0.0, 0.4]])
    found = relative(np.array([[0.1, 0.2]]), generic, 0.5)
    assert found == pytest.approx(np.array([[0.1 / 0.1, 0.2 / 0.5]]))
    assert np.isfinite(relative(np.ones((1, 2)), np.zeros((1, 2)), 0.0)).all()


def test_lift():
    covered = np.array([[0.5, 0], [0, 0]])
    assert lift(np.ones((2, 2)), covered) == pytest.approx(1.0)  # even attention is chance
    assert lift(np.array([[1.0, 0], [0, 0]]), covered) == pytest.approx(0.5 / 0.125)
    assert lift(np.array([[0, 1.0], [0, 0]]), covered) == 0.0
    assert lift(np.zeros((2, 2)), covered) == 0.0
    stacked = lift(np.stack([np.ones((2, 2)), np.zeros((2, 2))]), covered)
    assert stacked == pytest.approx([1.0, 0.0])


def test_pointing():
    covered = np.array([[0.01, 0], [0, 0]])
    assert pointing(np.array([[3.0, 2], [1, 0]]), covered) == 1.0
    assert pointing(np.array([[1.0, 2], [1, 0]]), covered) == 0.0


def test_the_releases_ratio():
    cells = np.array([[True, True], [False, False]])
    assert release_ratio(np.array([[0.1, 0.2], [0.3, 0.0]]), cells) == pytest.approx(0.5)
    assert release_ratio(np.zeros((2, 2)), cells) == 0.0


def test_scores_of_heads_and_their_mean():
    question = np.array([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # one layer, two heads, one row of two cells
    generic = np.full_like(question, 0.5)
    found = scores(question, generic, np.array([[1.0, 0.0]]), 0.0)
    assert found.shape == (2, 2, 1, 3)
    assert found[0, 0, 0] == pytest.approx([2.0, 0.0, 1.0])
    assert found[1, 0, 0] == pytest.approx([2.0, 0.0, 1.0])
    assert found[0, 1, 0] == pytest.approx([1.0, 0.0, 1.0])
