"""Calibrate a model: ask every question once per needed way, keep the scores, choose thresholds, note where from.

The ways are: never zooming, and for each region threshold to be compared, zooming whatever the gate says (its score is
kept). All else is arithmetic over what was kept, so another wish asks nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.calibration.confidence import confidence_thresholds
from qzoom.calibration.points import Point, Sample, Wish, choose
from qzoom.calibration.questions import UserQuestions
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.metrics import exact_match
from qzoom.evaluation.records import AnswerRow

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["Calibration", "Looks", "calibrate", "samples_of"]


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

    from qzoom.evaluation.identity import weights_digest

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
