"""Two runs over the same questions: did a model's attention move onto the places? By pairs, on the reported half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qzoom.errors import DataError
from qzoom.evaluation.intervals import bootstrap, interval_of

__all__ = ["compare_coverage", "read_coverage"]

_FIGURES = ("layer_lift", "layer_hit", "head_lift", "head_hit")


def read_coverage(path: Path) -> dict[str, Any]:
    """The figures that a run wrote: coverage.json, or the folder that holds it.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    path = path / "coverage.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no figures of `qzoom eval coverage -o` in it ({error}).") from error
    rows = values.get("rows") if isinstance(values, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"picture", *_FIGURES} <= row.keys() for row in rows
    ):
        raise DataError(f"{path}: no figures of `qzoom eval coverage -o` in it; name its folder or file.")
    found: dict[str, Any] = values
    return found


def compare_coverage(this: dict[str, Any], other: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """This run less another, each at the layer and head that it chose itself, over the questions both reported.

    Args:
        this: figures with rows, as `Coverage.to_dict` gives them.
        other: those of the run that it is compared with.
        seed: of the draws.

    Returns:
        `n` and for each of layer_lift, layer_hit, head_lift, head_hit: this, other, difference, interval.

    Raises:
        DataError: no common question.
    """
    mine, theirs = ({(r["picture"], r["index"]): r for r in run["rows"] if r["reported"]} for run in (this, other))
    keys = [key for key in mine if key in theirs]
    if not keys:
        raise DataError("The two runs report no question in common; only runs over the same data can be compared.")
    out: dict[str, Any] = {"n": len(keys)}
    for name in _FIGURES:
        pairs = np.array([[side[key][name] for key in keys] for side in (mine, theirs)])
        drawn = bootstrap(pairs, [picture for picture, _ in keys], seed)
        first, second = (float(mean) for mean in pairs.mean(1))
        interval = list(interval_of(drawn[0] - drawn[1]))
        out[name] = {"this": first, "other": second, "difference": first - second, "interval": interval}
    return out
