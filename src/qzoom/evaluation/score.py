"""From rows to figures: shares, means and times of one run, and two runs side by side. Pure; costs nothing to redo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qzoom.errors import DataError
from qzoom.evaluation.metrics import anls, exact_match, hit, union_share
from qzoom.evaluation.records import AnswerRow

__all__ = ["Paired", "Scores", "compare", "is_right", "score"]


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one run; shares lie between 0 and 1, None stands for a share of nothing.

    Args:
        n: questions.
        exact_match: share answered right, per field and for "all".
        anls: mean similarity to the right answer.
        zoomed: share that read a region.
        hit_rate: of the zooms on questions with known places, the share whose regions hold one of the places.
        box_area: of the zooms, the mean share of the picture that the regions cover.
        visual_tokens: mean visual tokens per question, both looks.
        seconds: mean wall-clock time per question.
        seconds_total: of all questions.
        errors: questions without an answer, counted as wrong.
        difficulty: for tasks that know it, "easy" and "hard" with their n, exact_match and zoomed.
    """

    n: int
    exact_match: dict[str, float | None]
    anls: float | None
    zoomed: float | None
    hit_rate: float | None
    box_area: float | None
    visual_tokens: float | None
    seconds: float | None
    seconds_total: float
    errors: int
    difficulty: dict[str, dict[str, float | None]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `difficulty` only where it is known."""
        out = asdict(self)
        if not self.difficulty:
            del out["difficulty"]
        return out


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs over the same questions: how many both, only one, or neither got right."""

    n: int
    both: int
    only_first: int
    only_second: int
    neither: int


def is_right(row: AnswerRow) -> bool:
    """Whether the answer is an exact match; an error is wrong."""
    return row.error is None and exact_match(row.prediction, row.answer)


def score(rows: Sequence[AnswerRow], fields: Sequence[str] = ()) -> Scores:
    """The figures of a run.

    Args:
        rows: one per question.
        fields: fields to list even when nothing was asked about them; the others follow in alphabetical order.
    """
    names = dict.fromkeys([*fields, *sorted({row.field for row in rows})])
    exact = {name: _mean(is_right(row) for row in rows if row.field == name) for name in names}
    exact["all"] = _mean(is_right(row) for row in rows)
    zooms = [row for row in rows if row.zoomed]
    seconds = sum(row.seconds for row in rows)
    return Scores(
        n=len(rows),
        exact_match=exact,
        anls=_mean(0.0 if row.error else anls(row.prediction, [row.answer]) for row in rows),
        zoomed=_mean(row.zoomed for row in rows),
        hit_rate=_mean(hit([r.box for r in row.regions], row.boxes) for row in zooms if row.boxes),
        box_area=_mean(union_share([r.box for r in row.regions], row.size_px) for row in zooms),
        visual_tokens=_mean(row.usage.coarse_tokens + row.usage.region_tokens for row in rows if not row.error),
        seconds=_mean(row.seconds for row in rows),
        seconds_total=round(seconds, 4),
        errors=sum(row.error is not None for row in rows),
        difficulty=_difficulty(rows),
    )


def compare(first: Sequence[AnswerRow], second: Sequence[AnswerRow]) -> Paired:
    """Count the questions that two runs got right, together and alone.

    Raises:
        DataError: the runs asked different questions.
    """
    keys = [[(row.picture, row.index, row.question, row.answer) for row in rows] for rows in (first, second)]
    if keys[0] != keys[1]:
        raise DataError("Only runs over the same questions in the same order can be compared.")
    pairs = [(is_right(a), is_right(b)) for a, b in zip(first, second, strict=True)]
    return Paired(
        n=len(pairs),
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def _difficulty(rows: Sequence[AnswerRow]) -> dict[str, dict[str, float | None]]:
    out: dict[str, dict[str, float | None]] = {}
    for name, easy in (("easy", True), ("hard", False)):
        group = [row for row in rows if row.easy is easy]
        if group:
            out[name] = {
                "n": len(group),
                "exact_match": _mean(is_right(row) for row in group),
                "zoomed": _mean(row.zoomed for row in group),
            }
    return out


def _mean(values: Iterable[float]) -> float | None:
    kept = [float(value) for value in values]
    return sum(kept) / len(kept) if kept else None
