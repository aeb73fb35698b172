"""Intervals of means by drawing pictures with replacement. Pure and seeded.

Questions about one picture are not independent, so pictures are drawn, not questions. All runs are scored on the same
draws, so that differences of two rows are those of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["DRAWS", "bootstrap", "interval_of"]

DRAWS = 2000


def bootstrap(scores: np.ndarray, pictures: Sequence[str], seed: int, draws: int = DRAWS) -> np.ndarray:
    """Means over pictures drawn with replacement, the same draws for every run.

    Args:
        scores: (runs, questions).
        pictures: the picture of each question.
        seed: of the draws.
        draws: how many.

    Returns:
        (runs, draws).
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(pictures))}
    index = np.array([order[name] for name in pictures])
    count = len(order)
    sums = np.stack([np.bincount(index, weights=row, minlength=count) for row in scores])
    sizes = np.bincount(index, minlength=count)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return (sums @ weights.T) / (sizes @ weights.T)


def interval_of(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of draws (draws,)."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
