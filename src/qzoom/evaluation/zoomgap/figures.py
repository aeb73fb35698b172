"""From the answers of all views to the zooming gap: accuracies, differences by pairs, intervals. Pure and seeded.

Only questions whose answer has a place enter the gap, the same ones in every view: a question that failed in a view is
wrong there, never left out. Negatives, whose target is absent, are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from qzoom.evaluation.areas import AREA_BINS, area_bin, area_share
from qzoom.evaluation.intervals import bootstrap, interval_of
from qzoom.evaluation.metrics import normalise
from qzoom.evaluation.records import AnswerRow, EvalQuestion
from qzoom.evaluation.score import row_score
from qzoom.evaluation.zoomgap.places import Places, places_shown
from qzoom.evaluation.zoomgap.settings import VIEWS, View
from qzoom.evaluation.zoomgap.views import key_of

__all__ = ["GapFigures", "Scored", "enters_gap", "is_negative", "measure_gap", "scored"]

Variant = Literal["strict", "harness"]
_NONE = ("none", "noneofthese", "noneoftheabove", "noneofthem", "notpresent", "absent")


@dataclass(frozen=True, slots=True)
class Scored:
    """One question with its score in every view; the unit of all figures.

    Args:
        picture: id of the picture.
        index: number of the question among the picture's.
        question: its text and right answer, to tell runs over other data apart.
        kind: the question's field.
        area: bin of its region; None where the region is not known.
        scores: from 0 to 1, by view.
        negative: see `is_negative`.
    """

    picture: str
    index: int
    question: tuple[str, str]
    kind: str
    area: str | None
    scores: Mapping[View, float]
    negative: bool


@dataclass(frozen=True, slots=True)
class GapFigures:
    """The figures of one run; shares from 0 to 1, None for a share of nothing or a view that was not asked.

    Args:
        n: questions with a place.
        pictures: how many pictures they are about.
        accuracy: mean score per view.
        intervals: 95 % interval of each accuracy.
        gap: region less full.
        gap_interval: its 95 % interval by pairs, drawn by picture.
        zoom_gain: zoom less full, with its interval.
        per_kind: n, accuracies, gap and its interval per field.
        per_area: the same per bin of the region's area.
        negatives: n and accuracy of the full and the zoom view on questions whose target is absent.
        yes_no: of questions answered with yes or no: n, the share that truly is yes, the share said yes by view.
        without_place: questions that are neither.
        harness: accuracies as a benchmark's own harness gives them.
        errors: questions with a place that failed, per view; they count as wrong.
        visual_tokens: mean per view.
        dropped: pictures that some view has not answered yet (a run that was stopped).
    """

    n: int
    pictures: int
    accuracy: dict[View, float | None]
    intervals: dict[View, tuple[float, float] | None]
    gap: float | None
    gap_interval: tuple[float, float] | None
    zoom_gain: tuple[float, tuple[float, float]] | None
    per_kind: dict[str, dict[str, Any]]
    per_area: dict[str, dict[str, Any]]
    negatives: dict[str, Any]
    yes_no: dict[str, Any]
    without_place: int
    harness: dict[View, float | None]
    errors: dict[View, int]
    visual_tokens: dict[View, float | None]
    dropped: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the accuracies by the views' names."""
        gain = self.zoom_gain
        return {
            "n": self.n,
            "pictures": self.pictures,
            **{view: self.accuracy.get(view) for view in VIEWS},
            "gap": self.gap,
            "gap_interval": None if self.gap_interval is None else list(self.gap_interval),
            "zoom_gain": None if gain is None else gain[0],
            "zoom_gain_interval": None if gain is None else list(gain[1]),
            "intervals": {view: None if v is None else list(v) for view, v in self.intervals.items()},
            "per_kind": self.per_kind,
            "per_area": self.per_area,
            "negatives": self.negatives,
            "yes_no": self.yes_no,
            "without_place": self.without_place,
            "harness": dict(self.harness),
            "errors": dict(self.errors),
            "visual_tokens": dict(self.visual_tokens),
            "dropped": self.dropped,
        }


def is_negative(row: AnswerRow | EvalQuestion) -> bool:
    """Whether what is asked about is absent: marked so, or answered with "none", also as the right option's text."""
    if row.negative:
        return True
    said = [row.answer, *row.answers]
    if row.choices and len(row.answer) == 1 and 0 <= ord(row.answer) - ord("A") < len(row.choices):
        said.append(row.choices[ord(row.answer) - ord("A")])
    return any(normalise(text).rstrip(".") in _NONE for text in said)


def enters_gap(row: AnswerRow) -> bool:
    """Whether a question counts: its answer has a place. One that could not even be read counts, as wrong."""
    unreadable = row.field == "unusable" and row.error is not None
    return unreadable or (bool(row.boxes) and not is_negative(row))


def scored(
    rows: Mapping[View, Sequence[AnswerRow]], variant: Variant = "strict", places: Places = "auto"
) -> tuple[list[Scored], int]:
    """All questions of the full view with their scores in every view.

    Args:
        rows: per view.
        variant: of the metric.
        places: the rule that the region follows.

    Returns:
        The questions, in order, and how many pictures were dropped because a view has not answered them all.
    """
    found = {view: {_key(view, row): row for row in given} for view, given in rows.items()}
    missing = {
        row.picture
        for row in rows["full"]
        for view in rows
        if _wanted(view, row) and (row.picture, row.index) not in found[view]
    }
    out = []
    for row in rows["full"]:
        if row.picture in missing:
            continue
        key = (row.picture, row.index)
        scores = {view: row_score(found[view][key], variant) for view in rows if _wanted(view, row)}
        shown = places_shown(row.field, row.boxes, places)
        place = area_bin(area_share(shown, row.size_px)) if shown else None
        about = (row.question, row.answer)
        out.append(Scored(*key, about, row.field, place, scores, is_negative(row)))
    return out, len(missing)


def measure_gap(rows: Mapping[View, Sequence[AnswerRow]], seed: int = 0, places: Places = "auto") -> GapFigures:
    """The figures of a run.

    Args:
        rows: per view; the full view's are all questions, the others' at least those that enter the gap.
        seed: of the draws behind the intervals.
        places: the rule that the region follows, for the bins of its area.
    """
    views = [view for view in VIEWS if view in rows]
    every, dropped = scored(rows, places=places)
    harness, _ = scored(rows, "harness")
    entering = {(row.picture, row.index) for row in rows["full"] if enters_gap(row)}
    placed = [item for item in every if (item.picture, item.index) in entering]
    negatives = [item for item in every if item.negative]
    used = {(item.picture, item.index) for item in placed}
    own = {view: [row for row in rows[view] if _key(view, row) in used] for view in views}
    drawn = _drawn(placed, views, seed)
    both = "region" in views and bool(placed)
    return GapFigures(
        n=len(placed),
        pictures=len({item.picture for item in placed}),
        accuracy=_accuracy(placed, views),
        intervals={view: interval_of(drawn[view]) if placed else None for view in views},
        gap=_difference(placed, "region", "full") if both else None,
        gap_interval=interval_of(drawn["region"] - drawn["full"]) if both else None,
        zoom_gain=(_difference(placed, "zoom", "full"), interval_of(drawn["zoom"] - drawn["full"]))
        if "zoom" in views and placed
        else None,
        per_kind=_groups(placed, views, seed, lambda item: item.kind, sorted({item.kind for item in placed})),
        per_area=_groups(placed, views, seed, lambda item: item.area, AREA_BINS),
        negatives={"n": len(negatives)} | _accuracy(negatives, [v for v in views if v in ("full", "zoom")]),
        yes_no=_yes_no(rows),
        without_place=len(every) - len(placed) - sum(not _in(item, used) for item in negatives),
        harness=_accuracy([item for item in harness if _in(item, used)], views),
        errors={view: sum(row.error is not None for row in own[view]) for view in views},
        visual_tokens={view: _mean(_tokens(row) for row in own[view] if row.error is None) for view in views},
        dropped=dropped,
    )


def _key(view: View, row: AnswerRow) -> tuple[str, int]:
    return key_of(row) if view in ("region", "boxed") else (row.picture, row.index)


def _wanted(view: View, row: AnswerRow) -> bool:
    return view in ("full", "zoom") or enters_gap(row)


def _in(item: Scored, keys: set[tuple[str, int]]) -> bool:
    return (item.picture, item.index) in keys


def _accuracy(items: Sequence[Scored], views: Sequence[View]) -> dict[Any, float | None]:
    return {view: _mean(item.scores[view] for item in items) for view in views}


def _difference(items: Sequence[Scored], first: View, second: View) -> float:
    return float(np.mean([item.scores[first] - item.scores[second] for item in items]))


def _drawn(items: Sequence[Scored], views: Sequence[View], seed: int) -> dict[View, np.ndarray]:
    """Means of every view over the same draws of pictures."""
    if not items:
        return {}
    scores = np.array([[item.scores[view] for item in items] for view in views])
    return dict(zip(views, bootstrap(scores, [item.picture for item in items], seed), strict=True))


def _groups(
    items: Sequence[Scored],
    views: Sequence[View],
    seed: int,
    name: Callable[[Scored], str | None],
    names: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Figures per group, groups without a question left out."""
    out: dict[str, dict[str, Any]] = {}
    for wanted in names:
        group = [item for item in items if name(item) == wanted]
        if not group:
            continue
        out[wanted] = {"n": len(group), **_accuracy(group, views)}
        if "region" in views:
            drawn = _drawn(group, views, seed)
            out[wanted]["gap"] = _difference(group, "region", "full")
            out[wanted]["gap_interval"] = list(interval_of(drawn["region"] - drawn["full"]))
    return out


def _yes_no(rows: Mapping[View, Sequence[AnswerRow]]) -> dict[str, Any]:
    """How often yes is the truth, and how often it is said."""
    views: list[View] = [view for view in ("full", "zoom") if view in rows]
    asked = {view: [row for row in rows[view] if normalise(row.answer) in ("yes", "no")] for view in views}
    truth = asked["full"]
    said = {view: _mean(normalise(row.prediction).startswith("yes") for row in found) for view, found in asked.items()}
    return {"n": len(truth), "truly_yes": _mean(normalise(row.answer) == "yes" for row in truth), "said_yes": said}


def _tokens(row: AnswerRow) -> int:
    return row.usage.coarse_tokens + row.usage.region_tokens


def _mean(values: Any) -> float | None:
    kept = [float(value) for value in values]
    return sum(kept) / len(kept) if kept else None
