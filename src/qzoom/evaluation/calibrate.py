"""Choose gate and region thresholds for a goal, from the user's own questions (docs/calibration.md).

Every question is answered without zooming and with it, and the gate's score is stored: sorted by score, every cut
between two questions is an operating point, without further answers. A loss is bounded by the share of *harmed*
questions, tested in rising order of the threshold (fixed-sequence testing, arXiv 2101.02703).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from qzoom.checkpoints.weights import weights_digest
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.data.samples import AnswerRow, Task
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.runner import EvalOptions, run
from qzoom.model import QZoom
from qzoom.scoring.agree import exact_match
from qzoom.scoring.intervals import questions_needed, upper_bound
from qzoom.scoring.metrics import wilson_interval
from qzoom.settings import Positive, Share, settings

CONFIDENCE_GATES = ("margin", "entropy")
"""Names in `qzoom.evaluation.methods.METHODS`."""


@dataclass(frozen=True, slots=True)
class PairedAnswers:
    """One question, asked without zooming and with."""

    score: float
    zooms: bool  # whether a region was found; without one the coarse answer stands whatever the gate says
    harmed: bool  # whether not zooming loses the answer
    gained: bool  # whether not zooming saves the answer (the zoomed one is wrong, the coarse one right)
    coarse_s: float  # seconds of the coarse answer, what decides included
    zoomed_s: float  # seconds of the answer when the gate says zoom


@settings(prefix=False)
class CalibrationGoal:
    """The operating point that is wanted: exactly one of share, latency and loss."""

    share_zoomed: Share | None = None
    """Share of the questions that zooms."""
    latency_ms: Positive | None = None
    """Most milliseconds per question, on average."""
    max_accuracy_loss: float | None = None
    """Most accuracy lost against always zooming."""
    confidence: float = 0.95
    """Confidence of the bound on the loss and of the intervals."""

    def __post_init__(self) -> None:
        goals = [x for x in (self.share_zoomed, self.latency_ms, self.max_accuracy_loss) if x is not None]
        if len(goals) != 1:
            raise ConfigError("Give exactly one wish: --share-zoomed, --latency-ms or --max-accuracy-loss.")
        questions_needed(0.5 if self.max_accuracy_loss is None else self.max_accuracy_loss, self.confidence)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What a gate threshold gives."""

    threshold: float
    n: int
    share_zoomed: float
    latency_ms: float
    harmed: float
    loss: float  # accuracy lost against always zooming, negative for a gain (without labels: share of other answers)
    # of what the goal names, with its confidence: two-sided for share and latency; for the loss from 0 to the exact
    # upper bound
    interval: tuple[float, float] = (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, rounded to six decimals."""
        out = {name: round(value, 6) for name, value in asdict(self).items() if isinstance(value, float)}
        return {**out, "n": self.n, "interval": [round(side, 6) for side in self.interval]}


def sweep(samples: Sequence[PairedAnswers]) -> list[OperatingPoint]:
    """Every point from "always zooms" (threshold 0) to "never", one for each cut between two different scores
    (DataError: no samples, or a score outside 0..1)."""
    if not samples:
        raise DataError("There is not one question with a gate score, so no threshold can be chosen.")
    if not all(0 <= sample.score <= 1 for sample in samples):
        raise DataError("A gate score lies outside 0 to 1.")
    ordered = sorted(samples, key=lambda sample: sample.score)
    n = len(ordered)
    zoomed = sum(sample.zooms for sample in ordered)
    total_s = math.fsum(sample.zoomed_s for sample in ordered)
    harmed = gained = 0
    out = [OperatingPoint(0.0, n, zoomed / n, 1000 * total_s / n, 0.0, 0.0)]
    for i, sample in enumerate(ordered):
        zoomed -= sample.zooms
        total_s += sample.coarse_s - sample.zoomed_s
        harmed += sample.harmed
        gained += sample.gained
        above = ordered[i + 1].score if i + 1 < n else 1.0
        if above > sample.score:
            loss = (harmed - gained) / n
            out.append(
                OperatingPoint(_between(sample.score, above), n, zoomed / n, 1000 * total_s / n, harmed / n, loss)
            )
    return out


def choose(samples: Sequence[PairedAnswers], goal: CalibrationGoal, candidates: int = 1) -> OperatingPoint:
    """The point that meets a goal.

    Args:
        candidates: how many region thresholds were compared on the same questions; the loss's confidence is shared
            among them.

    Returns:
        For a share the nearest one (the smaller of two); for a latency the most zooming within it; for a loss the
        least zooming whose bound, and that of every point before it, stays within it.

    Raises:
        DataError: the questions are too few for the confidence, or no threshold reaches the goal.
    """
    points = sweep(samples)
    if goal.share_zoomed is not None:
        wanted = goal.share_zoomed
        best = min(points, key=lambda p: (round(abs(p.share_zoomed - wanted), 12), p.share_zoomed))
        z = NormalDist().inv_cdf((1 + goal.confidence) / 2)
        return dataclasses.replace(best, interval=wilson_interval(round(best.share_zoomed * best.n), best.n, z))
    if goal.latency_ms is not None:
        return _within_latency(samples, points, goal)
    assert goal.max_accuracy_loss is not None
    _check_count(len(samples), goal, candidates)
    confidence = 1 - (1 - goal.confidence) / candidates
    best, bound = points[0], upper_bound(0, len(samples), confidence)
    for point in points:
        own = upper_bound(round(point.harmed * point.n), point.n, confidence)
        if own > goal.max_accuracy_loss:
            break
        best, bound = point, own
    return dataclasses.replace(best, interval=(0.0, bound))


def _check_count(questions: int, goal: CalibrationGoal, candidates: int) -> None:
    """Refuse a bound on the loss that so few questions can never show; see `choose`."""
    if goal.max_accuracy_loss is None:
        return
    needed = questions_needed(goal.max_accuracy_loss, 1 - (1 - goal.confidence) / candidates)
    if questions < needed:
        shared = f" with {candidates} region thresholds to choose from" if candidates > 1 else ""
        raise DataError(
            f"{questions} questions are too few: to promise a loss of at most {goal.max_accuracy_loss:g} with "
            f"confidence {goal.confidence:g}{shared} takes at least {needed}; give more questions, allow more loss or "
            "ask for less confidence."
        )


def _within_latency(
    samples: Sequence[PairedAnswers], points: Sequence[OperatingPoint], goal: CalibrationGoal
) -> OperatingPoint:
    assert goal.latency_ms is not None
    within = [point for point in points if point.latency_ms <= goal.latency_ms * (1 + 1e-9)]
    if not within:
        fastest = min(point.latency_ms for point in points)
        raise DataError(
            f"No threshold answers within {goal.latency_ms:g} ms on average: the fastest takes {fastest:.1f} ms; allow "
            "more time or fewer tokens for the coarse view."
        )
    best = min(within, key=lambda point: point.threshold)
    times = [1000 * (s.zoomed_s if s.score >= best.threshold else s.coarse_s) for s in samples]
    return dataclasses.replace(best, interval=_mean_interval(times, goal.confidence))


def _mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Normal interval of a mean."""
    mean = fmean(values)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return (mean - half, mean + half) if len(values) > 1 else (0.0, math.inf)


def _between(low: float, high: float) -> float:
    """A threshold above `low` and at most `high`, so that a score of `high` still zooms."""
    middle = (low + high) / 2
    return middle if middle > low else high


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen and on what grounds."""

    gate_threshold: float
    region_threshold: float
    point: OperatingPoint  # what these give on the questions
    asked: int  # questions that count
    failed: int  # questions left out, because they could not be asked
    # share of these that always zooming answers right at `region_threshold`; None without labels
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
    questions: Task,
    goal: CalibrationGoal,
    options: EvalOptions | None = None,
    *,
    region_thresholds: Sequence[float] = (),
    keep: Path | None = None,
    date: str | None = None,
    confidence_gates: bool = False,
    on_picture: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Choose thresholds for an operating point.

    Args:
        options: token limits and longest answer; the rest of it is not used.
        region_thresholds: to be compared (questions with answers only); empty keeps the checkpoint's own.
        keep: folder of the answers; a rerun, also with another goal, asks only what is missing.
        date: noted in the provenance as it is; None notes none.
        confidence_gates: also choose thresholds for "margin" and "entropy" that zoom as often, to compare with.
        on_picture: called with (name of the answers' file, pictures done, pictures in all).

    Raises:
        HeadsMissingError: no gate or no region branch.
        DataError: too few questions for the confidence, or no threshold reaches the goal.
        ConfigError: region thresholds to compare without labels.
    """
    own = model.config.region_threshold
    thresholds = tuple(sorted(set(region_thresholds))) or (own,)
    answers = _right_answers(questions)
    labelled = any(answers.values())
    _check_calibration(model, thresholds, labelled=labelled)
    _check_count(len(answers), goal, len(thresholds))  # before the first is asked
    options = options or EvalOptions()

    def ask(name: str, **changes: Any) -> list[AnswerRow]:
        output, listener = keep and keep / f"{name}.jsonl", on_picture and functools.partial(on_picture, name)
        changed = dataclasses.replace(options, **changes)
        # a question that the gate leaves alone has paid for the branches' part of its session too
        both = "method" not in changes
        return run(model, questions, changed, output=output, on_picture=listener, all_branches=both)

    never = ask("never", zoom="never", region_tokens=None)
    # zoomed whatever the gate says, whose score the answers carry
    always = {t: ask(f"zoom-{t:g}", zoom="auto", gate_threshold=0.0, region_threshold=t) for t in thresholds}
    right = {t: sum(_is_right(row, answers) for row in rows) for t, rows in always.items()}
    best = max(thresholds, key=lambda t: (right[t], -abs(t - own), t))
    pairs, failed = pair_answers(never, always[best], questions, model.config.decide_by)
    if not pairs:
        raise DataError(f"None of the {failed} questions could be asked; try one with `qzoom ask`.")
    point = choose(pairs, goal, len(thresholds))
    provenance = _origin(model, questions, goal, options)
    provenance |= {"labelled": labelled, "failed": failed, "region_thresholds": list(thresholds)}
    provenance |= {"reached": point.to_dict()} | ({} if date is None else {"date": date})
    if confidence_gates:
        provenance["confidence_gates"] = _confidence_gates(ask, always[best], point.share_zoomed)
    share = _always_right(never, always[best], answers) if labelled else None
    return Calibration(point.threshold, best, point, len(pairs), failed, share, provenance)


def _origin(model: QZoom, questions: Task, goal: CalibrationGoal, options: EvalOptions) -> dict[str, Any]:
    """What a calibration rests on."""
    return {
        "questions_sha256": questions.identity["sha256"],
        "weights": weights_digest(model.engine),
        "wish": {name: value for name, value in asdict(goal).items() if value is not None},
        "coarse_tokens": _ends(options.coarse_tokens),
        "region_tokens": _ends(options.region_tokens),
    }


def _confidence_gates(ask: Callable[..., list[AnswerRow]], zoomed: Sequence[AnswerRow], share: float) -> dict[str, Any]:
    """Thresholds of the methods that need no gate, at the same share of zooms."""
    first_token = {"zoom": "auto", "region_tokens": None, "gate_threshold": 1.0, "max_new_tokens": 1}
    return {
        name: confidence_threshold(ask(name, **first_token, method=name), zoomed, share) for name in CONFIDENCE_GATES
    }


def _ends(limits: TokenBudget | None) -> list[int] | None:
    return [limits.min_tokens, limits.max_tokens] if limits else None


def _check_calibration(model: QZoom, thresholds: Sequence[float], *, labelled: bool) -> None:
    """Find what makes a calibration impossible before the first question."""
    if not (model.has_gate and model.has_region):
        raise HeadsMissingError(
            "Only a model with a gate and a region branch has thresholds to choose; train them with `qzoom train`."
        )
    if len(thresholds) > 1 and not labelled:
        raise ConfigError("Region thresholds can only be compared on questions with answers; add them or compare none.")


_DECIDING_STEP = {"gate": "gate", "map": "region"}
"""The step of an answer's times in which it is decided whether to zoom."""


def pair_answers(
    never: Sequence[AnswerRow], always: Sequence[AnswerRow], questions: Task, decide_by: str = "gate"
) -> tuple[list[PairedAnswers], int]:
    """Pair both answers to every question.

    Args:
        always: the same questions, zoomed whatever the gate's score, which they carry.
        questions: with the right answers, or without; then the zoomed answer counts as right.
        decide_by: what decides (`ZoomConfig.decide_by`); its time is part of a coarse answer's. That of "answer" is the
            coarse answer itself.

    Returns:
        The pairs, and how many questions were left out because one of their answers failed.
    """
    answers = _right_answers(questions)
    labelled = any(answers.values())
    out: list[PairedAnswers] = []
    for coarse, zoomed in zip(never, always, strict=True):
        if coarse.error or zoomed.error or zoomed.gate is None or zoomed.gate.score is None:
            continue
        if labelled:
            first, second = _is_right(coarse, answers), _is_right(zoomed, answers)
        else:
            first, second = exact_match(coarse.prediction, zoomed.prediction), True
        decision_s = zoomed.timing_ms.get(_DECIDING_STEP.get(decide_by, ""), 0.0) / 1000
        out.append(
            PairedAnswers(
                score=zoomed.gate.score,
                zooms=zoomed.gate.zoomed,
                harmed=second and not first,
                gained=first and not second,
                coarse_s=coarse.seconds + decision_s,
                zoomed_s=zoomed.seconds,
            )
        )
    return out, len(never) - len(out)


def confidence_threshold(doubts: Sequence[AnswerRow], always: Sequence[AnswerRow], share: float) -> dict[str, float]:
    """The threshold of a confidence gate whose share of zooms is nearest to a wanted one, and that share.

    Args:
        doubts: with the gate's score of every question.
        always: the same questions, zoomed where a region was found.

    Raises:
        DataError: no question with both.
    """
    pairs = [
        PairedAnswers(doubt.gate.score, zoomed.gate.zoomed, harmed=False, gained=False, coarse_s=0.0, zoomed_s=0.0)
        for doubt, zoomed in zip(doubts, always, strict=True)
        if not doubt.error and not zoomed.error and doubt.gate and zoomed.gate and doubt.gate.score is not None
    ]
    if not pairs:
        raise DataError("There is not one question with a confidence, so no threshold can be chosen.")
    point = choose(pairs, CalibrationGoal(share_zoomed=share))
    return {"threshold": point.threshold, "share_zoomed": round(point.share_zoomed, 6)}


def _right_answers(questions: Task) -> dict[tuple[str, int], tuple[str, ...]]:
    """The right answers of every (picture, number of its question), any of which counts; none without labels."""
    return {(sample.id, i): question.answers for sample in questions for i, question in enumerate(sample.questions)}


def _always_right(
    never: Sequence[AnswerRow], always: Sequence[AnswerRow], answers: dict[tuple[str, int], tuple[str, ...]]
) -> float:
    """The share of right zoomed answers among the questions whose answers both came about."""
    asked = [zoomed for coarse, zoomed in zip(never, always, strict=True) if not coarse.error and not zoomed.error]
    return fmean(_is_right(row, answers) for row in asked)


def _is_right(row: AnswerRow, answers: dict[tuple[str, int], tuple[str, ...]]) -> bool:
    return row.error is None and any(exact_match(row.prediction, one) for one in answers[row.picture, row.index])
