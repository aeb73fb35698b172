"""Two runs over the same questions: by how much full accuracy and gap differ, by pairs. Pure and seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qzoom.errors import DataError
from qzoom.evaluation.intervals import bootstrap, interval_of
from qzoom.evaluation.records import AnswerRow
from qzoom.evaluation.zoomgap.figures import Scored, enters_gap, scored
from qzoom.evaluation.zoomgap.settings import VIEWS, View

__all__ = ["compare_gaps"]

Rows = Mapping[View, Sequence[AnswerRow]]


def compare_gaps(rows: Rows, other: Rows, seed: int = 0) -> dict[str, Any]:
    """This run less another, over the pictures that both answered.

    Args:
        rows: per view.
        other: the run that it is compared with, for example the model before training.
        seed: of the draws.

    Returns:
        `n`, `dropped` (questions that only one run answered), and for each view that both asked, for "gap" (region
        less full) and for "negatives" (full view): this run's figure, the other's, their difference and its 95 %
        interval; for the gap also `closed`, the share of the other's gap that is gone.

    Raises:
        DataError: the runs share no question, or give one different right answers.
    """
    mine, theirs = _by_key(rows), _by_key(other)
    keys = [key for key in mine if key in theirs]
    for key in keys:
        if mine[key].question != theirs[key].question:
            raise DataError(
                f"The runs differ in question {key[1]} about {key[0]!r}; only runs over the same data can be compared."
            )
    if not keys:
        raise DataError("The two runs have no question in common; only runs over the same data can be compared.")
    entering = {(row.picture, row.index) for row in rows["full"] if enters_gap(row)}
    views = [view for view in VIEWS if view in rows and view in other]
    placed = [(mine[key], theirs[key]) for key in keys if key in entering]
    negatives = [(mine[key], theirs[key]) for key in keys if mine[key].negative]
    dropped = len(mine.keys() ^ theirs.keys())
    out: dict[str, Any] = {"n": len(placed), "dropped": dropped}
    for view in views:
        out[view] = _paired(placed, lambda item, view=view: item.scores[view], seed)
    if "region" in views:
        out["gap"] = _paired(placed, lambda item: item.scores["region"] - item.scores["full"], seed)
        if out["gap"] is not None:
            before = out["gap"]["other"]
            out["gap"]["closed"] = (before - out["gap"]["this"]) / before if before > 0 else None
    out["negatives"] = _paired(negatives, lambda item: item.scores["full"], seed)
    return out


def _by_key(rows: Rows) -> dict[tuple[str, int], Scored]:
    return {(item.picture, item.index): item for item in scored(rows)[0]}


def _paired(pairs: Sequence[tuple[Scored, Scored]], value: Any, seed: int) -> dict[str, Any] | None:
    """Both means, their difference and its interval; None without pairs."""
    if not pairs:
        return None
    scores = np.array([[value(item) for item in side] for side in zip(*pairs, strict=True)])
    drawn = bootstrap(scores, [first.picture for first, _ in pairs], seed)
    this, other = (float(mean) for mean in scores.mean(1))
    return {
        "n": len(pairs),
        "this": this,
        "other": other,
        "difference": this - other,
        "interval": list(interval_of(drawn[0] - drawn[1])),
    }
