import numpy as np

from qzoom.scoring.intervals import bootstrap, interval_of


def test_draws_are_shared_and_weighted_by_questions():
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    drawn = bootstrap(scores, ["a", "a", "b"], seed=3, draws=500)
    assert drawn.shape == (2, 500)
    assert (drawn[0] == drawn[1]).all()
    # two pictures drawn twice: both a, both b, or one each, which has two right answers of three
    assert {round(float(value), 6) for value in drawn[0]} == {0.0, round(2 / 3, 6), 1.0}
    assert (bootstrap(scores, ["a", "a", "b"], seed=3, draws=500) == drawn).all()
    low, high = interval_of(np.arange(1001) / 1000)
    assert (round(low, 6), round(high, 6)) == (0.025, 0.975)
