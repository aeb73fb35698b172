"""Intervals: of means, by drawing pictures with replacement, and exact binomial bounds of a share. Pure and seeded.

Questions about one picture are not independent, so pictures are drawn, not questions. All runs are scored on the same
draws, so that differences of two rows are differences of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from qzoom.errors import ConfigError

DRAWS = 2000


def bootstrap(scores: np.ndarray, pictures: Sequence[str], seed: int, draws: int = DRAWS) -> np.ndarray:
    """Means over pictures drawn with replacement, the same draws for every run.

    Args:
        scores: (runs, questions).

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


def paired_difference(this: Sequence[float], other: Sequence[float], pictures: Sequence[str], seed: int) -> Any:
    """Two runs over the same questions, as JSON values. Returns both means as `this` and `other`, their `difference`
    and its 95 % `interval`."""
    values = np.array([this, other], dtype=float)
    drawn = bootstrap(values, pictures, seed)
    first, second = (float(mean) for mean in values.mean(1))
    interval = list(interval_of(drawn[0] - drawn[1]))
    return {"this": first, "other": second, "difference": first - second, "interval": interval}


def binomial_cdf(successes: int, n: int, share: float) -> float:
    """Probability of at most `successes` among `n` independent trials that succeed with probability `share`."""
    if successes >= n or share <= 0:
        return 1.0
    if successes < 0 or share >= 1:
        return 0.0
    rate, rest = math.log(share), math.log1p(-share)
    terms = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * rate + (n - k) * rest
        for k in range(successes + 1)
    )
    return min(1.0, math.fsum(math.exp(term) for term in terms))


@lru_cache(maxsize=4096)
def upper_bound(failures: int, n: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share.

    Args:
        n: trials; without any the bound is 1.
        confidence: probability that the bound holds, in (0, 1).

    Returns:
        The largest share under which so few failures still have a probability of 1 - confidence.
    """
    if n <= failures:
        return 1.0
    low, high = failures / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_cdf(failures, n, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def questions_needed(loss: float, confidence: float) -> int:
    """The fewest questions that can show a loss below a bound, even if not one of them is lost (ConfigError: a number
    outside its range). `loss`: the bound, in (0, 1). `confidence`: in (0, 1)."""
    for name, value in (("The accuracy loss", loss), ("The confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1, both excluded, not {value!r}.")
    return math.ceil(math.log(1 - confidence) / math.log1p(-loss) - 1e-12)
