"""From what every question scored and cost to operating points, and from a wish to one of them. Pure.

Questions are sorted by the gate's score; every cut between two scores is a point: those above it zoom. What a question
gives and costs on either side of the cut has been measured, so no point needs asking again.

A question is *harmed* at a point when it does not zoom there and the zoomed answer was right (without labels: another
one) while the coarse answer is not. Accuracy lost against always zooming never exceeds the share harmed, and that
share only grows with the threshold. So the largest threshold below which the exact upper bound of the harmed share
stays within the limit keeps that limit with the stated confidence, whatever the scores (the fixed-sequence argument of
risk-controlling prediction sets, arXiv 2101.02703).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qzoom.calibration.bounds import questions_needed, upper_bound
from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.metrics import wilson_interval

__all__ = ["Point", "Sample", "Wish", "choose", "sweep"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One question, asked without zooming and with.

    Args:
        score: the gate's.
        zooms: whether a region was found; without one the coarse answer stands whatever the gate says.
        harmed: whether not zooming loses the answer.
        gained: whether not zooming saves the answer (the zoomed one is wrong, the coarse one right).
        coarse_s: seconds of the coarse answer, the gate included.
        zoomed_s: seconds of the answer when the gate says zoom.
    """

    score: float
    zooms: bool
    harmed: bool
    gained: bool
    coarse_s: float
    zoomed_s: float


@dataclass(frozen=True, slots=True)
class Wish:
    """The operating point that is wanted: exactly one of share, latency and loss.

    Args:
        share_zoomed: of the questions, 0 to 1.
        latency_ms: mean per question.
        max_accuracy_loss: against always zooming.
        confidence: of the loss's bound and of the intervals.

    Raises:
        ConfigError: none or several, or a number out of range.
    """

    share_zoomed: float | None = None
    latency_ms: float | None = None
    max_accuracy_loss: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        given = [x for x in (self.share_zoomed, self.latency_ms, self.max_accuracy_loss) if x is not None]
        if len(given) != 1:
            raise ConfigError("Give exactly one wish: --share-zoomed, --latency-ms or --max-accuracy-loss.")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"The confidence must lie between 0 and 1, both excluded, not {self.confidence!r}.")
        if self.share_zoomed is not None and not 0 <= self.share_zoomed <= 1:
            raise ConfigError(f"The share zoomed must be a number from 0 to 1, not {self.share_zoomed!r}.")
        if self.latency_ms is not None and not (self.latency_ms > 0 and math.isfinite(self.latency_ms)):
            raise ConfigError(f"The latency must be a positive number of milliseconds, not {self.latency_ms!r}.")
        if self.max_accuracy_loss is not None:
            questions_needed(self.max_accuracy_loss, self.confidence)


@dataclass(frozen=True, slots=True)
class Point:
    """What a gate threshold gives.

    Args:
        threshold: of the gate.
        n: questions.
        share_zoomed: of them.
        latency_ms: mean.
        harmed: share harmed.
        loss: accuracy lost against always zooming, negative for a gain (without labels: share of other answers).
        interval: of what was wished for, with the wish's confidence: two-sided for share and latency; for the loss from
            0 to the exact upper bound.
    """

    threshold: float
    n: int
    share_zoomed: float
    latency_ms: float
    harmed: float
    loss: float
    interval: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, rounded to what can be told."""
        out = {name: round(value, 6) for name, value in asdict(self).items() if isinstance(value, float)}
        return {**out, "n": self.n, "interval": [round(side, 6) for side in self.interval]}


def sweep(samples: Sequence[Sample]) -> list[Point]:
    """Every point from "always zooms" (threshold 0) to "never", one for each cut between two different scores.

    Raises:
        DataError: no samples, or a score outside 0..1.
    """
    if not samples:
        raise DataError("There is not one question with a gate score, so no threshold can be chosen.")
    if not all(0 <= sample.score <= 1 for sample in samples):
        raise DataError("A gate score lies outside 0 to 1.")
    ordered = sorted(samples, key=lambda sample: sample.score)
    n = len(ordered)
    zoomed = sum(sample.zooms for sample in ordered)
    total_s = math.fsum(sample.zoomed_s for sample in ordered)
    harmed = gained = 0
    out = [Point(0.0, n, zoomed / n, 1000 * total_s / n, 0.0, 0.0)]
    for i, sample in enumerate(ordered):
        zoomed -= sample.zooms
        total_s += sample.coarse_s - sample.zoomed_s
        harmed += sample.harmed
        gained += sample.gained
        above = ordered[i + 1].score if i + 1 < n else 1.0
        if above > sample.score:
            loss = (harmed - gained) / n
            out.append(Point(_between(sample.score, above), n, zoomed / n, 1000 * total_s / n, harmed / n, loss))
    return out


def choose(samples: Sequence[Sample], wish: Wish, candidates: int = 1) -> Point:
    """The point that meets a wish.

    Args:
        samples: what was measured.
        wish: what is wanted.
        candidates: how many region thresholds were compared on the same questions; the loss's confidence is shared
            among them.

    Returns:
        For a share the nearest one (the smaller of two); for a latency the most zooming within it; for a loss the
        least zooming whose bound, and that of every point before it, stays within it.

    Raises:
        DataError: the questions are too few for the confidence, or no threshold reaches the wish.
    """
    points = sweep(samples)
    if wish.share_zoomed is not None:
        wanted = wish.share_zoomed
        best = min(points, key=lambda p: (round(abs(p.share_zoomed - wanted), 12), p.share_zoomed))
        return _with(best, _wilson(best.share_zoomed, best.n, wish.confidence))
    if wish.latency_ms is not None:
        return _within_latency(samples, points, wish)
    assert wish.max_accuracy_loss is not None
    confidence = 1 - (1 - wish.confidence) / candidates
    needed = questions_needed(wish.max_accuracy_loss, confidence)
    if len(samples) < needed:
        shared = f" with {candidates} region thresholds to choose from" if candidates > 1 else ""
        raise DataError(
            f"{len(samples)} questions are too few: to promise a loss of at most {wish.max_accuracy_loss:g} with "
            f"confidence {wish.confidence:g}{shared} takes at least {needed}; give more questions, allow more loss or "
            "ask for less confidence."
        )
    best, bound = points[0], upper_bound(0, len(samples), confidence)
    for point in points:
        own = upper_bound(round(point.harmed * point.n), point.n, confidence)
        if own > wish.max_accuracy_loss:
            break
        best, bound = point, own
    return _with(best, (0.0, bound))


def _within_latency(samples: Sequence[Sample], points: Sequence[Point], wish: Wish) -> Point:
    assert wish.latency_ms is not None
    within = [point for point in points if point.latency_ms <= wish.latency_ms * (1 + 1e-9)]
    if not within:
        fastest = min(point.latency_ms for point in points)
        raise DataError(
            f"No threshold answers within {wish.latency_ms:g} ms on average: the fastest takes {fastest:.1f} ms; allow "
            "more time or fewer tokens for the coarse look."
        )
    best = min(within, key=lambda point: point.threshold)
    times = [1000 * (s.zoomed_s if s.score >= best.threshold else s.coarse_s) for s in samples]
    return _with(best, _mean_interval(times, wish.confidence))


def _mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Normal interval of a mean."""
    from statistics import NormalDist, fmean, stdev

    mean = fmean(values)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return (mean - half, mean + half) if len(values) > 1 else (0.0, math.inf)


def _wilson(share: float, n: int, confidence: float) -> tuple[float, float]:
    from statistics import NormalDist

    return wilson_interval(round(share * n), n, NormalDist().inv_cdf((1 + confidence) / 2))


def _with(point: Point, interval: tuple[float, float]) -> Point:
    import dataclasses

    return dataclasses.replace(point, interval=interval)


def _between(low: float, high: float) -> float:
    """A threshold above `low` and at most `high`, so that a score of `high` still zooms."""
    middle = (low + high) / 2
    return middle if middle > low else high
