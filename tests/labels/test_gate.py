"""Gate labels from answers along a ladder of resolutions."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from qzoom.errors import DataError
from qzoom.labels.gate import Outcome, Trajectory, categorise, draw_label, label_outcomes, select_items

LADDER = (64, 128, 256, 512, 1024)


def ladder(*answers: object, truth: object = "72") -> Trajectory:
    return Trajectory(LADDER[: len(answers)], answers, truth)


def shares(trajectory: Trajectory, strategy: str = "consistency") -> dict[tuple[int, int], float]:
    return {(o.label, o.tokens): pytest.approx(o.probability) for o in label_outcomes(trajectory, strategy)}


@pytest.mark.parametrize(
    ("answers", "truth", "kind"),
    [
        (("72", "72", "72", "72", "72"), "72", "easy"),
        (("1", "3", "72", "72", "72"), "72", "hard"),
        (("1", "3", "9", "72", "72"), "72", "hard"),
        (("1", "72", "9", "72", "72"), "72", "dropped"),
        (("72", "72", "72", "72", "9"), "72", "dropped"),
        (("1", "72", "72", "72", "72"), "15", "dropped"),
        (("7.2!", "72 eur", "72", "72", "72"), "It is 72", "easy"),
    ],
)
def test_categories(answers, truth, kind):
    assert categorise(ladder(*answers, truth=truth)) == kind


def test_easy_is_enough_anywhere_below_the_reference():
    assert shares(ladder(*["72"] * 5)) == {(0, 64): 1 / 3, (0, 128): 1 / 3, (0, 256): 1 / 3}


def test_transition_prefers_the_last_two_wrong_rungs():
    assert shares(ladder("1", "3", "72", "72", "72")) == {(1, 64): 0.45, (1, 128): 0.45, (0, 256): 0.1}
    assert shares(ladder("1", "3", "9", "72", "72")) == {(1, 128): 0.45, (1, 256): 0.45, (-100, 64): 0.1}


def test_alternating_and_unstable_are_left_out():
    assert shares(ladder("72", "1", "72", "72", "72")) == {(-100, 64): 1.0}
    assert shares(ladder("72", "72", "72", "72", "1")) == {(-100, 64): 1.0}


def test_consensus_against_annotation_is_never_called_insufficient():
    assert shares(ladder("1", "72", "72", "72", truth="9")) == {(-100, 64): 0.9, (0, 128): 0.1}


@pytest.mark.parametrize("answers", [("72",), ("72", "72")])
def test_ladders_without_a_rung_below_the_reference_are_left_out(answers):
    trajectory = ladder(*answers)
    assert categorise(trajectory) == "easy"
    assert label_outcomes(trajectory) == (Outcome(-100, 64, 1.0),)


def test_naive_strategy_compares_with_the_annotation():
    assert shares(ladder("72", "1", "72", "9", "9"), "prediction_vs_gt") == {
        (0, 64): 1 / 3,
        (1, 128): 1 / 3,
        (0, 256): 1 / 3,
    }
    assert shares(ladder("72"), "prediction_vs_gt") == {(0, 64): 1.0}
    assert shares(ladder("", "", ""), "prediction_vs_gt") == {(1, 64): 1.0}


def test_draws_follow_the_distribution_and_the_seed():
    trajectory = ladder("1", "3", "72", "72", "72")
    rng = random.Random(5)
    counts = Counter(draw_label(trajectory, rng) for _ in range(4000))
    assert set(counts) == {(1, 64), (1, 128), (0, 256)}
    assert counts[0, 256] / 4000 == pytest.approx(0.1, abs=0.02)
    assert counts[1, 64] / 4000 == pytest.approx(0.45, abs=0.03)
    one, two = random.Random(1), random.Random(1)
    assert [draw_label(trajectory, one) for _ in range(9)] == [draw_label(trajectory, two) for _ in range(9)]


def test_selection_keeps_hard_ones_and_draws_as_many_easy_ones():
    hard, easy, bad = ladder("1", "72", "72"), ladder("72", "72", "72"), ladder("72", "72", "1")
    pool = [easy, hard, bad, easy, easy, hard, easy]
    chosen = select_items(pool, seed=3)
    assert chosen[:2] == [1, 5]
    assert len(chosen) == 4
    assert set(chosen[2:]) <= {0, 3, 4, 6}
    assert chosen == select_items(pool, seed=3)
    assert select_items([hard, hard, easy], seed=0) == [0, 1, 2]
    assert select_items([easy, easy], seed=0) == []


def test_contradicting_trajectories_are_named():
    with pytest.raises(DataError, match="one answer per resolution"):
        Trajectory((64, 128), ("a",), "a")
    with pytest.raises(DataError, match="must rise"):
        Trajectory((128, 64), ("a", "b"), "a")
