"""From maps to the figures of a run: chosen layer and head, curves over the depth, the release's own measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qzoom.errors import DataError
from qzoom.evaluation.coverage.cells import covered_cells, inclusive_cells
from qzoom.evaluation.coverage.choosing import choose, choosing_half, depth
from qzoom.evaluation.coverage.maps import QuestionMaps
from qzoom.evaluation.coverage.statistics import EPSILON, MEASURES, release_ratio, scores
from qzoom.evaluation.intervals import bootstrap, interval_of

__all__ = ["RELEASE_DEPTH", "Coverage", "measure_coverage"]

RELEASE_DEPTH = 2 / 3
"""Depth of the one layer that the authors' release looks at: the 24th of 36."""


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """The figures of one run.

    Args:
        n: questions with a place.
        pictures: how many pictures they are about.
        errors: questions that could not be asked; they have no maps and are in no figure.
        reported: questions of the half that did not choose.
        epsilon: see `statistics.EPSILON`.
        area: mean share of the picture that a place covers.
        chance_hit: mean share of the cells that a place touches: what pointing at random would hit.
        measures: per name in `MEASURES`: "layer" and "head" as chosen, and the curves over all layers of the whole run:
            "lift" and "hit" of the mean over the heads, "best_lift" of each layer's best head.
        release: the authors' own measure at its depth: mean ratio, what chance would give, the layer.
        per_kind: n and the chosen layer's relative lift and hit per field, on the reported half.
        rows: per question its picture, number and the values at the chosen places, for comparisons.
        depths: of every layer.
    """

    n: int
    pictures: int
    errors: int
    reported: int
    epsilon: float
    area: float
    chance_hit: float
    measures: dict[str, dict[str, Any]]
    release: dict[str, Any]
    per_kind: dict[str, dict[str, Any]]
    rows: tuple[dict[str, Any], ...]
    depths: tuple[float, ...]

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """Plain JSON types.

        Args:
            rows: include every question.
        """
        names = ("n", "pictures", "errors", "reported", "epsilon", "area", "chance_hit", "measures", "release")
        out = {name: getattr(self, name) for name in (*names, "per_kind")} | {"depths": list(self.depths)}
        return out | ({"rows": list(self.rows)} if rows else {})


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """One question's figures: `values` as `statistics.scores` gives them, then shares of area and of attention."""

    name: tuple[str, int, str]
    values: np.ndarray
    area: float
    touched: float
    release_ratio: float
    release_chance: float


def measure_coverage(found: Iterable[QuestionMaps], *, epsilon: float = EPSILON, seed: int = 0) -> Coverage:
    """The figures.

    Args:
        found: the questions' maps; they are taken one by one.
        epsilon: see `statistics.EPSILON`.
        seed: of the draws behind the intervals.

    Raises:
        DataError: fewer than two pictures with places that could be asked about.
    """
    kept: list[_Question] = []
    failed: list[str] = []
    for item in found:
        one = _question(item, epsilon)
        if isinstance(one, str):
            failed.append(one)
        else:
            kept.append(one)
    if not kept:
        reason = f" The first failed so: {failed[0]}" if failed else " Use data with boxes."
        raise DataError(f"No question with a place could be asked.{reason}")
    array, names = np.stack([one.values for one in kept]), [one.name for one in kept]
    pictures, layers = [picture for picture, _, _ in names], array.shape[3]
    measures = {name: _figures(array[:, i], pictures, seed) for i, name in enumerate(MEASURES)}
    return Coverage(
        n=len(kept),
        pictures=len(set(pictures)),
        errors=len(failed),
        reported=int((~choosing_half(pictures)).sum()),
        epsilon=epsilon,
        area=_mean(one.area for one in kept),
        chance_hit=_mean(one.touched for one in kept),
        measures=measures,
        release=_release(kept, pictures, layers, seed),
        per_kind=_per_kind(array[:, 0, :, measures["relative"]["layer"]["layer"], -1], names),
        rows=_rows(array, names, measures),
        depths=tuple(depth(i, layers) for i in range(layers)),
    )


def _question(item: QuestionMaps, epsilon: float) -> _Question | str:
    """One question's figures, or why there are none."""
    if item.error is not None:
        return item.error
    grid = (int(item.asked.shape[2]), int(item.asked.shape[3]))
    covered = covered_cells(item.boxes, item.size_px, grid)
    if not covered.any():
        return f"a box about {item.picture!r} lies outside the picture."
    cells = inclusive_cells(item.boxes[0], item.size_px, grid)
    own_layer = item.asked[_release_layer(item.asked.shape[0])].mean(0)
    return _Question(
        (item.picture, item.index, item.kind),
        scores(item.asked, item.generic, covered, epsilon),
        float(covered.mean()),
        float((covered > 0).mean()),
        release_ratio(own_layer, cells),
        float(cells.mean()),
    )


def _release_layer(layers: int) -> int:
    return round(RELEASE_DEPTH * layers) - 1


def _release(kept: Sequence[_Question], pictures: Sequence[str], layers: int, seed: int) -> dict[str, Any]:
    """The authors' own measure over all questions."""
    ratios = np.array([[one.release_ratio for one in kept]])
    at = _release_layer(layers)
    return {
        "layer": at,
        "depth": depth(at, layers),
        "ratio": float(ratios.mean()),
        "ratio_interval": list(interval_of(bootstrap(ratios, pictures, seed)[0])),
        "chance": _mean(one.release_chance for one in kept),
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _figures(values: np.ndarray, pictures: Sequence[str], seed: int) -> dict[str, Any]:
    """One measure's chosen places and curves; `values` is (questions, 2 figures, layers, heads + 1)."""
    means = values.mean(0)
    return {
        "layer": choose(values, pictures, of_heads=False, seed=seed).to_dict(),
        "head": choose(values, pictures, of_heads=True, seed=seed).to_dict(),
        "lift": means[0, :, -1].tolist(),
        "hit": means[1, :, -1].tolist(),
        "best_lift": means[0, :, :-1].max(-1).tolist(),
        "best_head": means[0, :, :-1].argmax(-1).tolist(),
    }


def _per_kind(values: np.ndarray, names: Sequence[tuple[str, int, str]]) -> dict[str, dict[str, Any]]:
    """The reported half's figures per kind; `values` is (questions, 2 figures)."""
    reported = ~choosing_half([name for name, _, _ in names])
    out = {}
    for kind in sorted({kind for _, _, kind in names}):
        chosen = np.array([own == kind for _, _, own in names]) & reported
        if chosen.any():
            lift, hit = values[chosen].mean(0)
            out[kind] = {"n": int(chosen.sum()), "lift": float(lift), "hit": float(hit)}
    return out


def _rows(
    values: np.ndarray, names: Sequence[tuple[str, int, str]], measures: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    reported = ~choosing_half([name for name, _, _ in names])
    layer, head = (measures["relative"][which] for which in ("layer", "head"))
    return tuple(
        {
            "picture": picture,
            "index": index,
            "kind": kind,
            "reported": bool(reported[i]),
            "layer_lift": float(values[i, 0, 0, layer["layer"], -1]),
            "layer_hit": float(values[i, 0, 1, layer["layer"], -1]),
            "head_lift": float(values[i, 0, 0, head["layer"], head["head"]]),
            "head_hit": float(values[i, 0, 1, head["layer"], head["head"]]),
        }
        for i, (picture, index, kind) in enumerate(names)
    )
