"""From what every question scored and cost to operating points, and from a wish to one of them. Pure.

Questions are sorted by the gate's score; every cut between two scores is a point: those above it zoom. What a question
gives and costs on either side of the cut has been measured, so no point needs asking again.

A question is *harmed* at a point when it does not zoom there and the zoomed answer was right (without labels: another
one) while the coarse answer is not. Accuracy lost against always zooming never exceeds the share harmed, and that
share only grows with the threshold. So the largest threshold below which the exact upper bound of the harmed share
stays within the limit keeps that limit with the stated confidence, whatever the scores (the fixed-sequence argument of
risk-controlling prediction sets, arXiv 2101.02703).

Thresholds of the gates by the answer's confidence, so that they zoom as often as the trained gate does.

Gates can only be compared at the same share of zooms. Each question's doubt is known after one token of its coarse
answer; whether a zoom finds a region has been measured already.

Calibrate a model: ask every question once per needed way, keep the scores, choose thresholds, note where from.

The ways are: never zooming, and for each region threshold to be compared, zooming whatever the gate says (its score is
kept). All else is arithmetic over what was kept, so another wish asks nothing anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.config import TokenBudget, ZoomConfig
from qzoom.data.questions import UserQuestions
from qzoom.data.samples import AnswerRow
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.scoring.intervals import questions_needed, upper_bound
from qzoom.scoring.metrics import exact_match, wilson_interval

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.model import QZoom

__all__ = [
    "GATES",
    "Calibration",
    "Looks",
    "Point",
    "Sample",
    "Wish",
    "calibrate",
    "choose",
    "confidence_thresholds",
    "samples_of",
    "sweep",
    "threshold_for",
]


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


GATES = ("margin", "entropy")
"""Names in `qzoom.evaluation.methods.METHODS`."""


def confidence_thresholds(
    model: QZoom,
    questions: Task,
    always: Sequence[AnswerRow],
    share: float,
    *,
    coarse: TokenBudget | None = None,
    keep: Path | None = None,
    on_picture: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """For each of `GATES` its threshold and the share of the questions that zooms from it.

    Args:
        model: the model.
        questions: those that `always` answers.
        always: the same questions, zoomed whatever the gate says.
        share: of the questions that the trained gate zooms.
        coarse: limits of the coarse look.
        keep: folder of the answers.
        on_picture: told (gate, pictures done, pictures in all).

    Raises:
        DataError: not one question could be asked.
    """
    from qzoom.evaluation.runner import EvalOptions, run

    out = {}
    for name in GATES:
        options = EvalOptions("auto", coarse, None, gate_threshold=1.0, max_new_tokens=1, method=name)
        told = None if on_picture is None else lambda done, total, gate=name: on_picture(gate, done, total)
        rows = run(model, questions, options, output=keep and keep / f"{name}.jsonl", on_picture=told)
        out[name] = threshold_for(rows, always, share)
    return out


def threshold_for(rows: Sequence[AnswerRow], always: Sequence[AnswerRow], share: float) -> dict[str, float]:
    """The threshold whose share of zooms is nearest to a wanted one, and that share.

    Args:
        rows: with the gate's score of every question.
        always: the same questions, zoomed where a region was found.
        share: wanted.

    Raises:
        DataError: no question with both.
    """
    samples = [
        Sample(said.gate.score, zoomed.gate.zoomed, harmed=False, gained=False, coarse_s=0.0, zoomed_s=0.0)
        for said, zoomed in zip(rows, always, strict=True)
        if not said.error and not zoomed.error and said.gate and zoomed.gate and said.gate.score is not None
    ]
    if not samples:
        raise DataError("There is not one question with a confidence, so no threshold can be chosen.")
    point = choose(samples, Wish(share_zoomed=share))
    return {"threshold": point.threshold, "share_zoomed": round(point.share_zoomed, 6)}


@dataclass(frozen=True, slots=True)
class Looks:
    """How the questions are asked.

    Args:
        coarse: limits of the coarse look; None for the checkpoint's.
        region: limits of the regions; None for the checkpoint's.
        max_new_tokens: most tokens of an answer.
        region_thresholds: to be compared (questions with answers only); empty keeps the checkpoint's own.
    """

    coarse: TokenBudget | None = None
    region: TokenBudget | None = None
    max_new_tokens: int = 128
    region_thresholds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen and on what grounds.

    Args:
        gate_threshold: to zoom from.
        region_threshold: of the map.
        point: what these give on the questions.
        asked: questions that count.
        failed: questions left out, because they could not be asked.
        always: share that always zooming answers right at `region_threshold`; None without labels.
        provenance: for the config.
    """

    gate_threshold: float
    region_threshold: float
    point: Point
    asked: int
    failed: int
    always: float | None
    provenance: dict[str, Any]

    def applied(self, config: ZoomConfig) -> ZoomConfig:
        """The config with these thresholds, and how they came about under provenance: calibration."""
        return config.replace(
            gate_threshold=self.gate_threshold,
            region_threshold=self.region_threshold,
            provenance=config.provenance | {"calibration": self.provenance},
        )


def calibrate(
    model: QZoom,
    questions: UserQuestions,
    wish: Wish,
    looks: Looks | None = None,
    *,
    keep: Path | None = None,
    date: str | None = None,
    confidence_gates: bool = False,
    on_picture: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Choose thresholds for a wish.

    Args:
        model: with gate and region branch.
        questions: the user's.
        wish: the operating point.
        looks: how to ask.
        keep: folder of the answers; a rerun, also with another wish, asks only what is missing.
        date: noted in the provenance as it is; None notes none.
        confidence_gates: also choose thresholds for the methods "margin" and "entropy", so that they zoom as often.
        on_picture: told (way, pictures done, pictures in all).

    Raises:
        HeadsMissingError: no gate or no region branch.
        DataError: too few questions for the confidence, or no threshold reaches the wish.
        ConfigError: region thresholds to compare without labels.
    """
    if not (model.has_gate and model.has_region):
        raise HeadsMissingError(
            "Only a model with a gate and a region branch has thresholds to choose; train them with `qzoom train`."
        )
    looks = looks or Looks()
    own = model.config.region_threshold
    thresholds = tuple(sorted(set(looks.region_thresholds))) or (own,)
    if len(thresholds) > 1 and not questions.labelled:
        raise ConfigError("Region thresholds can only be compared on questions with answers; add them or compare none.")
    never = _ask(model, questions, looks, None, keep, on_picture)
    always = {t: _ask(model, questions, looks, t, keep, on_picture) for t in thresholds}
    best = max(thresholds, key=lambda t: (_right(always[t], questions), -abs(t - own), t))
    samples, failed = samples_of(never, always[best], questions)
    if not samples:
        raise DataError(f"None of the {failed} questions could be asked; try one with `qzoom ask`.")
    point = choose(samples, wish, len(thresholds))
    share = _right(always[best], questions) / len(always[best]) if questions.labelled else None
    facts = _facts(model, questions, wish, looks, thresholds, point, failed, date)
    if confidence_gates:
        facts["confidence_gates"] = confidence_thresholds(
            model, questions, always[best], point.share_zoomed, coarse=looks.coarse, keep=keep, on_picture=on_picture
        )
    return Calibration(point.threshold, best, point, len(samples), failed, share, facts)


def samples_of(
    never: Sequence[AnswerRow], always: Sequence[AnswerRow], questions: UserQuestions
) -> tuple[list[Sample], int]:
    """Pair both ways of every question.

    Args:
        never: asked without zooming.
        always: the same questions, zoomed whatever the gate's score, which they carry.
        questions: with the right answers, or without; then the zoomed answer counts as right.

    Returns:
        The samples, and how many questions were left out because one of the ways failed.
    """
    out: list[Sample] = []
    for coarse, zoomed in zip(never, always, strict=True):
        if coarse.error or zoomed.error or zoomed.gate is None or zoomed.gate.score is None:
            continue
        if questions.labelled:
            first, second = _is_right(coarse, questions), _is_right(zoomed, questions)
        else:
            first, second = exact_match(coarse.prediction, zoomed.prediction), True
        gate_s = zoomed.timing_ms.get("gate", 0.0) / 1000
        out.append(
            Sample(
                score=zoomed.gate.score,
                zooms=zoomed.gate.zoomed,
                harmed=second and not first,
                gained=first and not second,
                coarse_s=coarse.seconds + gate_s,
                zoomed_s=zoomed.seconds,
            )
        )
    return out, len(never) - len(out)


def _ask(
    model: QZoom,
    questions: UserQuestions,
    looks: Looks,
    region_threshold: float | None,
    keep: Path | None,
    on_picture: Callable[[str, int, int], None] | None,
) -> list[AnswerRow]:
    """All questions in one way: None never zooms; a region threshold always does, by a gate threshold of 0."""
    from qzoom.evaluation.runner import EvalOptions, run

    if region_threshold is None:
        way, options = "never", EvalOptions("never", looks.coarse, None, max_new_tokens=looks.max_new_tokens)
    else:
        way = f"zoom-{region_threshold:g}"
        options = EvalOptions("auto", looks.coarse, looks.region, 0.0, region_threshold, looks.max_new_tokens)
    told = None if on_picture is None else lambda done, total: on_picture(way, done, total)
    kept = keep and keep / f"{way}.jsonl"
    # a question that the gate leaves alone has paid for the branches' part of its session too
    return run(model, questions, options, output=kept, on_picture=told, all_branches=True)


def _is_right(row: AnswerRow, questions: UserQuestions) -> bool:
    right = questions.answers[row.picture, row.index]
    return row.error is None and any(exact_match(row.prediction, answer) for answer in right)


def _right(rows: Sequence[AnswerRow], questions: UserQuestions) -> int:
    return sum(_is_right(row, questions) for row in rows)


def _facts(
    model: QZoom,
    questions: UserQuestions,
    wish: Wish,
    looks: Looks,
    thresholds: tuple[float, ...],
    point: Point,
    failed: int,
    date: str | None,
) -> dict[str, Any]:
    """Plain JSON: what was wanted, on which questions, and what was reached."""
    import dataclasses

    from qzoom.evaluation.runner import weights_digest

    limits = {"coarse_tokens": looks.coarse, "region_tokens": looks.region}
    facts: dict[str, Any] = {
        "questions_sha256": questions.sha256,
        "labelled": questions.labelled,
        "failed": failed,
        "weights": weights_digest(model.engine),
        "wish": {name: value for name, value in dataclasses.asdict(wish).items() if value is not None},
        "region_thresholds": list(thresholds),
        **{name: [b.min_tokens, b.max_tokens] if b else None for name, b in limits.items()},
        "reached": point.to_dict(),
    }
    return facts if date is None else facts | {"date": date}
