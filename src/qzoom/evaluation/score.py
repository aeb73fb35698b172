"""Figures of answers: shares, means and times of one run, and paired counts of two runs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal

from qzoom.data.cells import AREA_BINS, area_bin, area_share
from qzoom.data.samples import AnswerRow
from qzoom.errors import DataError
from qzoom.scoring.agree import exact_match
from qzoom.scoring.metrics import METRICS, anls, hit, is_unread, union_share


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one run; shares lie between 0 and 1, None stands for a share of nothing."""

    n: int
    exact_match: dict[str, float | None]  # share answered right, per field and for "all"
    anls: float | None  # mean similarity to the right answer
    zoomed: float | None  # share that read a region
    # of the zooms on questions with known places, the share whose regions hold one of the places
    hit_rate: float | None
    box_area: float | None  # of the zooms, the mean share of the picture that the regions cover
    visual_tokens: float | None
    seconds: float | None
    seconds_total: float
    errors: int  # questions without an answer, counted as wrong
    # for tasks that know it, "easy" and "hard" with their n, exact_match and zoomed
    difficulty: dict[str, dict[str, float | None]]
    metric: str = ""  # name of the task's own metric; names joined by "+" where questions differ in it
    # mean of the task's metric per field and for "all"; see `qzoom.scoring.metrics.METRICS`
    strict: dict[str, float | None] = dataclass_field(default_factory=dict)
    harness: dict[str, float | None] = dataclass_field(default_factory=dict)  # the same as lmms-eval computes it
    # per bin of the area of the answer's places, for questions that have one: n, strict and zoomed
    areas: dict[str, dict[str, float | None]] = dataclass_field(default_factory=dict)
    # answers to multiple-choice questions in which no option could be read, counted as wrong by the strict metric; None
    # without such questions
    unread: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `difficulty`, `areas` and `unread` only where they are known."""
        out = asdict(self)
        for name in ("difficulty", "areas", "unread"):
            if out[name] in ({}, None):
                del out[name]
        return out


def row_score(row: AnswerRow, variant: Literal["strict", "harness"] = "strict") -> float:
    """What one answer gets by its question's metric, from 0 to 1; an error gets 0 (DataError: a metric that this
    version does not know)."""
    if row.metric not in METRICS:
        raise DataError(f"Question {row.picture!r} was kept with the unknown metric {row.metric!r}; ask it again.")
    if row.error is not None:
        return 0.0
    return getattr(METRICS[row.metric], variant)(row.prediction, row.answers or (row.answer,), row.choices)


def _matches(row: AnswerRow) -> bool:
    return row.error is None and any(exact_match(row.prediction, answer) for answer in row.answers or (row.answer,))


def score(rows: Sequence[AnswerRow], fields: Sequence[str] = ()) -> Scores:
    """The figures of a run. `fields`: fields to list even when nothing was asked about them; the others follow in
    alphabetical order."""
    names = dict.fromkeys([*fields, *sorted({row.field for row in rows})])
    exact = _per_field(rows, names, _matches)
    zooms = [row for row in rows if row.zoomed]
    return Scores(
        n=len(rows),
        exact_match=exact,
        anls=mean(0.0 if row.error else anls(row.prediction, row.answers or [row.answer]) for row in rows),
        zoomed=mean(row.zoomed for row in rows),
        hit_rate=mean(hit([r.box for r in row.regions], row.boxes) for row in zooms if row.boxes),
        box_area=mean(union_share([r.box for r in row.regions], row.size_px) for row in zooms),
        visual_tokens=mean(row.visual_tokens for row in rows if not row.error),
        seconds=mean(row.seconds for row in rows),
        seconds_total=round(sum(row.seconds for row in rows), 4),
        errors=sum(row.error is not None for row in rows),
        difficulty=_difficulty(rows),
        metric="+".join(sorted({row.metric for row in rows})),
        strict=_per_field(rows, names, row_score),
        harness=_per_field(rows, names, lambda row: row_score(row, "harness")),
        areas=_areas(rows),
        unread=_unread(rows),
    )


def _unread(rows: Sequence[AnswerRow]) -> int | None:
    choices = [row for row in rows if row.choices and METRICS[row.metric].is_choice]
    if not choices:
        return None
    return sum(row.error is None and is_unread(row.metric, row.prediction, row.choices) for row in choices)


def _per_field(
    rows: Sequence[AnswerRow], names: Iterable[str], value: Callable[[AnswerRow], float]
) -> dict[str, float | None]:
    """Means per field, and of all rows as "all"."""
    values = [(row.field, value(row)) for row in rows]
    means = {name: mean(v for field, v in values if field == name) for name in names}
    return means | {"all": mean(v for _, v in values)}


def _difficulty(rows: Sequence[AnswerRow]) -> dict[str, dict[str, float | None]]:
    out: dict[str, dict[str, float | None]] = {}
    for name, easy in (("easy", True), ("hard", False)):
        group = [row for row in rows if row.easy is easy]
        if group:
            out[name] = {
                "n": len(group),
                "exact_match": mean(_matches(row) for row in group),
                "zoomed": mean(row.zoomed for row in group),
            }
    return out


def _areas(rows: Sequence[AnswerRow]) -> dict[str, dict[str, float | None]]:
    placed = [(area_bin(area_share(row.boxes, row.size_px)), row) for row in rows if row.boxes and all(row.size_px)]
    out: dict[str, dict[str, float | None]] = {}
    for name in AREA_BINS:
        group = [row for own, row in placed if own == name]
        if group:
            out[name] = {
                "n": len(group),
                "strict": mean(map(row_score, group)),
                "zoomed": mean(row.zoomed for row in group),
            }
    return out


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else None
