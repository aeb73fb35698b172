"""How settings are chosen from measured points, and paired comparisons of runs. Pure.

A point is one method with its figures on a set of questions. Gate thresholds are tried without asking again: each
answer is taken from the run that always zooms or from the plain run at the same coarse tokens, by the gate score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qzoom.data.samples import AnswerRow
from qzoom.errors import DataError

GATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Gate thresholds that are tried; 0 always zooms."""


@dataclass(frozen=True, slots=True)
class Point:
    """A way to look and what it came to.

    Args:
        coarse: most tokens of the coarse view.
        region: most tokens of the regions; 0 is the plain model.
        gate: threshold; None for the plain model.
        accuracy: share of right answers.
        tokens: mean visual tokens per question.
        gflops: mean operations per question in units of 10^9; 0 where unknown.
    """

    coarse: int
    region: int
    gate: float | None
    accuracy: float
    tokens: float
    gflops: float

    @property
    def cap(self) -> int:
        """Most visual tokens of a question."""
        return self.coarse + self.region


def splits_of(
    caps: Sequence[int], coarse: Sequence[int], region: Sequence[int], ratio: float = 6.0
) -> list[tuple[int, int]]:
    """Pairs of limits worth trying: within the largest cap, and neither look more than `ratio` times the other."""
    every = ((c, r) for c in coarse for r in region)
    return [(c, r) for c, r in every if c + r <= max(caps) and r <= ratio * c and c <= ratio * r]


def gated(plain: Sequence[AnswerRow], zoomed: Sequence[AnswerRow], threshold: float) -> list[AnswerRow]:
    """The answers that a gate threshold would have given.

    Args:
        plain: of the coarse pass alone.
        zoomed: of the same questions, gate asked and always zoomed.
        threshold: zoom from this score on; a question without a score zooms.

    Raises:
        DataError: other questions, or in another order.
    """
    if [(r.picture, r.index) for r in plain] != [(r.picture, r.index) for r in zoomed]:
        raise DataError("A gate can only be tried on two runs over the same questions.")
    out = []
    for coarse, fine in zip(plain, zoomed, strict=True):
        score = fine.gate.score if fine.gate is not None else None
        if fine.error is not None or score is None or score >= threshold:
            out.append(fine)
        else:
            assert fine.gate is not None
            out.append(dataclasses.replace(coarse, gate=dataclasses.replace(fine.gate, zoomed=False)))
    return out


def plain_peak(points: Iterable[Point]) -> Point:
    """The most accurate plain point; of equal ones the cheapest."""
    return min((p for p in points if not p.region), key=lambda p: (-p.accuracy, p.cap))


def best_split(points: Iterable[Point], cap: int, tolerance: float = 0.0) -> Point | None:
    """The zooming point to use within a cap.

    Args:
        points: measured on the calibration questions.
        cap: most tokens of both looks together.
        tolerance: of the points at most so much less accurate than the best one, the cheapest is taken.

    Returns:
        None where no point fits.
    """
    able = [p for p in points if p.region and p.cap <= cap]
    if not able:
        return None
    least = max(p.accuracy for p in able) - tolerance
    return min((p for p in able if p.accuracy >= least - 1e-12), key=lambda p: (p.gflops, p.tokens, p.cap))


def lowest_match(points: Iterable[Point], accuracy: float) -> Point | None:
    """The zooming point of the lowest cap that is at least so accurate, of these the cheapest; None without one."""
    able = [p for p in points if p.region and p.accuracy >= accuracy - 1e-12]
    return min(able, key=lambda p: (p.cap, p.gflops, p.tokens), default=None)


def is_right(row: AnswerRow) -> bool:
    """Whether the answer gets all that the question's strict metric gives, which mostly is an exact match."""
    from qzoom.evaluation.score import row_score

    return row_score(row) == 1.0


def right_counts(first: Sequence[AnswerRow], second: Sequence[AnswerRow]) -> dict[str, int]:
    """Questions that two runs got right: both, one alone, neither.

    Raises:
        DataError: the runs asked different questions.
    """
    keys = [[(row.picture, row.index, row.question, row.answer) for row in rows] for rows in (first, second)]
    if keys[0] != keys[1]:
        raise DataError("Only runs over the same questions in the same order can be compared.")
    right = [(is_right(one), is_right(other)) for one, other in zip(first, second, strict=True)]
    kinds = {"both": (True, True), "only_first": (True, False), "only_second": (False, True), "neither": (False, False)}
    return {"n": len(right)} | {name: right.count(kind) for name, kind in kinds.items()}


def interval_by_picture(rows: Sequence[AnswerRow], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a run's accuracy; pictures are drawn with replacement, see `paired`."""
    import numpy as np

    from qzoom.evaluation.score import row_score
    from qzoom.scoring.intervals import bootstrap, interval_of

    scores = np.array([[row_score(row) for row in rows]])
    return interval_of(bootstrap(scores, [row.picture for row in rows], seed)[0])


def paired(first: Sequence[AnswerRow], second: Sequence[AnswerRow], seed: int = 0) -> dict[str, Any]:
    """Two runs over the same questions: the difference with its interval, and who was right alone.

    Pictures are drawn with replacement, since questions about one picture depend on each other.
    """
    from qzoom.evaluation.score import row_score
    from qzoom.scoring.intervals import paired_difference

    counts, pictures = right_counts(first, second), [row.picture for row in first]
    pair = paired_difference(*([row_score(row) for row in rows] for rows in (first, second)), pictures, seed)
    return {
        "questions": counts["n"],
        "pictures": len(set(pictures)),
        "difference": pair["difference"],
        "interval": pair["interval"],
        "only_first": counts["only_first"],
        "only_second": counts["only_second"],
    }


def skip_at(scored: Sequence[tuple[float, bool, bool]], accuracy: float) -> float | None:
    """The largest share of questions that may be answered without zooming at no less than an accuracy.

    Args:
        scored: gate score, coarse answer right, zoomed answer right, for each question.
        accuracy: to be kept.

    Returns:
        None where even zooming always stays below it.
    """
    ordered = sorted(scored)
    right, best = sum(zoomed for _, _, zoomed in ordered), None
    if right >= accuracy * len(ordered) - 1e-9:
        best = 0.0
    for place, (score, coarse, zoomed) in enumerate(ordered, start=1):
        right += coarse - zoomed
        ends = place == len(ordered) or ordered[place][0] > score
        if ends and right >= accuracy * len(ordered) - 1e-9:
            best = place / len(ordered)
    return best
