"""Exact binomial bounds: what a count of failures among questions says about their true share. Pure."""

from __future__ import annotations

import math

from qzoom.errors import ConfigError

__all__ = ["binomial_cdf", "questions_needed", "upper_bound"]


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


def upper_bound(failures: int, n: int, confidence: float) -> float:
    """Clopper and Pearson's one-sided upper bound of a share.

    Args:
        failures: how many of the n.
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
    """The fewest questions that can show a loss below a bound, even if not one of them is lost.

    Args:
        loss: the bound, in (0, 1).
        confidence: in (0, 1).

    Raises:
        ConfigError: a number outside its range.
    """
    for name, value in (("The accuracy loss", loss), ("The confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(f"{name} must lie between 0 and 1, both excluded, not {value!r}.")
    return math.ceil(math.log(1 - confidence) / math.log1p(-loss) - 1e-12)
