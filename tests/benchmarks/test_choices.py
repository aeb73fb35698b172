import pytest

from benchmarks.choices import Point, best_split, gated, lowest_match, paired, plain_peak, skip_at, splits_of
from qzoom.errors import DataError
from qzoom.types import GateDecision
from tests.evaluation.samples import row


def point(coarse, region, accuracy, gflops, gate=0.0):
    return Point(coarse, region, gate if region else None, accuracy, coarse + region, gflops)


TABLE = [
    point(64, 0, 0.20, 1.0),
    point(288, 0, 0.55, 4.0),
    point(1024, 0, 0.55, 16.0),
    point(64, 64, 0.50, 2.0),
    point(64, 144, 0.56, 3.0),
    point(100, 108, 0.56, 2.5),
    point(144, 144, 0.60, 4.5),
    point(144, 144, 0.598, 3.5, gate=0.3),
]


def test_the_plain_peak_and_the_best_split():
    assert plain_peak(TABLE) == TABLE[1]
    assert best_split(TABLE, 100) is None
    assert best_split(TABLE, 128) == TABLE[3]
    assert best_split(TABLE, 208) == TABLE[5]
    assert best_split(TABLE, 1024) == TABLE[6]
    assert best_split(TABLE, 1024, tolerance=0.005) == TABLE[7]
    assert best_split(TABLE, 1024, tolerance=0.05) == TABLE[5]
    assert splits_of([64, 200], [32, 100], [16, 100, 288], ratio=4) == [(32, 16), (32, 100), (100, 100)]
    assert lowest_match(TABLE, 0.55) == TABLE[5]
    assert lowest_match(TABLE, 0.50) == TABLE[3]
    assert lowest_match(TABLE, 0.60) == TABLE[6]
    assert lowest_match(TABLE, 0.61) is None


def scored(score, **values):
    return row(**values, zoom=[(0, 0, 9, 9)]).__class__.from_dict(
        row(**values, zoom=[(0, 0, 9, 9)]).to_dict() | {"gate": GateDecision(score, 0.0, True).to_dict()}
    )


def test_a_gate_is_tried_without_asking_again():
    plain = [row("coarse", index=0), row("coarse", index=1), row("coarse", index=2)]
    zoomed = [scored(0.2, prediction="fine", index=0), scored(0.4, prediction="fine", index=1)]
    zoomed.append(row(error="broken", index=2))
    mixed = gated(plain, zoomed, 0.4)
    assert [r.prediction for r in mixed] == ["coarse", "fine", ""]
    assert [r.zoomed for r in mixed] == [False, True, False]
    assert mixed[0].gate.score == 0.2
    assert [r.usage.region_tokens for r in mixed[:2]] == [0, 10]
    assert [r.prediction for r in gated(plain, zoomed, 0.0)] == ["fine", "fine", ""]
    with pytest.raises(DataError, match="same questions"):
        gated(plain[:2], zoomed, 0.4)


def test_pairs_and_how_much_may_be_skipped():
    first = [row("33.90", picture=name) for name in "abcd"]
    second = [row("33.90" if name == "a" else "1", picture=name) for name in "abcd"]
    found = paired(first, second)
    assert (found["questions"], found["pictures"], found["only_first"], found["only_second"]) == (4, 4, 3, 0)
    assert found["difference"] == pytest.approx(0.75)
    assert found["interval"][0] > 0
    assert found["interval"][1] == 1.0
    assert paired(first, first)["interval"] == [0.0, 0.0]
    with pytest.raises(DataError, match="same questions"):
        paired([row(picture="a")], [row(picture="b")])
    # score, coarse right, zoomed right
    table = [(0.1, True, True), (0.2, False, False), (0.3, False, True), (0.9, True, False)]
    assert skip_at(table, 0.5) == 1.0
    assert skip_at(table[:3], 2 / 3) == pytest.approx(2 / 3)
    assert skip_at(table, 0.75) is None
    assert skip_at([(0.5, False, False), (0.5, False, True), (0.6, True, True)], 2 / 3) == 0.0
