"""Planted scores, where the right threshold is known."""

import math

import pytest

from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.calibrate import Sample, Wish, choose, sweep
from qzoom.scoring.intervals import binomial_cdf, questions_needed, upper_bound


def sample(score, *, harmed=False, gained=False, zooms=True, coarse_s=0.1, zoomed_s=0.3):
    return Sample(score, zooms, harmed, gained, coarse_s, zoomed_s)


def planted(n, harmed_from):
    """Scores 1/(2n), 3/(2n), ...; every question from this score on loses its answer unless it zooms."""
    scores = [(2 * i + 1) / (2 * n) for i in range(n)]
    return [sample(score, harmed=score >= harmed_from) for score in scores]


def test_binomial_by_hand():
    assert binomial_cdf(0, 3, 0.5) == pytest.approx(1 / 8)
    assert binomial_cdf(1, 3, 0.5) == pytest.approx(4 / 8)
    assert binomial_cdf(2, 5, 0.2) == pytest.approx(sum(math.comb(5, k) * 0.2**k * 0.8 ** (5 - k) for k in range(3)))
    assert binomial_cdf(3, 3, 0.9) == 1
    assert binomial_cdf(-1, 3, 0.9) == 0


def test_upper_bound_is_the_share_with_five_percent_left():
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(5, 5, 0.95) == 1
    for failures, n in ((1, 20), (7, 50), (3, 1000)):
        bound = upper_bound(failures, n, 0.95)
        assert binomial_cdf(failures, n, bound) == pytest.approx(0.05, rel=1e-6)
        assert bound > failures / n


def test_questions_needed():
    assert questions_needed(0.01, 0.95) == 299
    assert questions_needed(0.5, 0.5) == 1
    n = questions_needed(0.02, 0.9)
    assert upper_bound(0, n, 0.9) <= 0.02 < upper_bound(0, n - 1, 0.9)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        questions_needed(0.0, 0.95)


def test_sweep_by_hand():
    samples = [
        sample(0.8, harmed=True, coarse_s=0.2, zoomed_s=0.4),
        sample(0.2, gained=True),
        sample(0.6, zooms=False, coarse_s=0.1, zoomed_s=0.1),
        sample(0.6),
    ]
    points = sweep(samples)
    assert [p.threshold for p in points] == pytest.approx([0.0, 0.4, 0.7, 0.9])
    assert [p.share_zoomed for p in points] == [0.75, 0.5, 0.25, 0.0]
    assert [p.harmed for p in points] == [0, 0, 0, 0.25]
    assert [p.loss for p in points] == [0, -0.25, -0.25, 0]
    assert [p.latency_ms for p in points] == pytest.approx([275, 225, 175, 125])


def test_a_score_of_one_always_zooms():
    points = sweep([sample(1.0), sample(0.25)])
    assert [(p.threshold, p.share_zoomed) for p in points] == [(0.0, 1.0), (0.625, 0.5)]


def test_the_share_wished_for():
    samples = planted(100, 2)
    found = choose(samples, Wish(share_zoomed=0.3))
    assert found.share_zoomed == 0.3
    assert found.threshold == pytest.approx(0.7)
    assert sum(s.score >= found.threshold for s in samples) == 30
    assert found.interval == pytest.approx((0.2189, 0.3958), abs=2e-4)
    assert choose(samples, Wish(share_zoomed=0.0)).share_zoomed == 0
    assert choose(samples, Wish(share_zoomed=1.0)).threshold == 0
    tied = [sample(0.5) for _ in range(10)]
    assert choose(tied, Wish(share_zoomed=0.3)).share_zoomed == 0


def test_the_latency_wished_for():
    samples = planted(100, 2)  # 100 ms coarse, 300 ms zoomed
    found = choose(samples, Wish(latency_ms=150))
    assert found.share_zoomed == 0.25
    assert found.latency_ms == pytest.approx(150)
    assert found.threshold == pytest.approx(0.75)
    low, high = found.interval
    half = 1.959964 * math.sqrt((25 * 150**2 + 75 * 50**2) / 99) / 10
    assert (low, high) == pytest.approx((150 - half, 150 + half), rel=1e-6)
    assert choose(samples, Wish(latency_ms=300)).threshold == 0
    with pytest.raises(DataError, match=r"the fastest takes 100\.0 ms"):
        choose(samples, Wish(latency_ms=99))


def test_the_loss_wished_for_finds_the_planted_threshold():
    """1000 questions, those above 0.4 need the zoom: the bound of 1 % allows k lost ones, no more."""
    samples = planted(1000, 0.4)
    allowed = max(k for k in range(20) if upper_bound(k, 1000, 0.95) <= 0.01)
    assert allowed == 4
    found = choose(samples, Wish(max_accuracy_loss=0.01))
    assert found.harmed == pytest.approx(allowed / 1000)
    assert found.threshold == pytest.approx(0.404)
    assert found.interval == (0.0, pytest.approx(upper_bound(4, 1000, 0.95)))
    strict = choose(samples, Wish(max_accuracy_loss=0.01, confidence=0.99))
    assert strict.harmed < found.harmed
    assert choose(samples, Wish(max_accuracy_loss=0.01), candidates=5).harmed < found.harmed
    assert choose(planted(1000, 2), Wish(max_accuracy_loss=0.01)).share_zoomed == 0
    assert choose(planted(1000, 0), Wish(max_accuracy_loss=0.01)).share_zoomed == pytest.approx(0.996)


def test_gains_do_not_buy_harm():
    samples = [sample(0.1, gained=True) for _ in range(500)] + planted(1000, 0.4)
    assert choose(samples, Wish(max_accuracy_loss=0.01)).threshold < 0.42


def test_the_bound_holds_as_often_as_it_says():
    """Where the true harm just exceeds the limit at a threshold, that threshold is passed in at most 10 % of draws."""
    import random

    drawn = random.Random(0)
    passed = 0
    for _ in range(300):
        samples = []
        for _ in range(200):
            score = drawn.random()
            samples.append(sample(score, harmed=drawn.random() < score))
        found = choose(samples, Wish(max_accuracy_loss=0.1, confidence=0.9))
        passed += found.threshold**2 / 2 > 0.1  # the true harm below a threshold t is the integral of the score, t*t/2
    assert passed <= 300 * 0.1 + 3 * math.sqrt(300 * 0.1 * 0.9)


def test_too_few_questions_are_refused():
    with pytest.raises(DataError, match=r"57 questions are too few.*at least 299"):
        choose(planted(57, 2), Wish(max_accuracy_loss=0.01))
    with pytest.raises(DataError, match=r"with 3 region thresholds to choose from takes at least 408"):
        choose(planted(299, 2), Wish(max_accuracy_loss=0.01), candidates=3)
    assert choose(planted(299, 2), Wish(max_accuracy_loss=0.01)).share_zoomed == 0
    with pytest.raises(DataError, match="not one question"):
        sweep([])
    with pytest.raises(DataError, match="outside"):
        sweep([sample(1.5)])


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"share_zoomed": 0.3, "latency_ms": 10},
        {"share_zoomed": 1.2},
        {"latency_ms": 0},
        {"latency_ms": math.nan},
        {"max_accuracy_loss": 0},
        {"max_accuracy_loss": 0.1, "confidence": 1.0},
    ],
)
def test_wishes_that_make_no_sense(wish):
    with pytest.raises(ConfigError):
        Wish(**wish)
