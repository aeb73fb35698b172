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


def measure_coverage(found: Iterable[QuestionMaps], *, epsilon: float = EPSILON, seed: int = 0) -> Coverage:
    """The figures.

    Args:
        found: the questions' maps; they are taken one by one.
        epsilon: see `statistics.EPSILON`.
        seed: of the draws behind the intervals.

    Raises:
        DataError: fewer than two pictures with places that could be asked about.
    """
    values, areas, touched, ratios, chances = [], [], [], [], []
    names: list[tuple[str, int, str]] = []
    errors, at, first_error = 0, 0, ""
    for item in found:
        if item.error is not None:
            errors, first_error = errors + 1, first_error or item.error
            continue
        grid = (int(item.asked.shape[2]), int(item.asked.shape[3]))
        covered = covered_cells(item.boxes, item.size_px, grid)
        if not covered.any():
            errors, first_error = errors + 1, first_error or f"a box about {item.picture!r} lies outside the picture."
            continue
        values.append(scores(item.asked, item.generic, covered, epsilon))
        areas.append(float(covered.mean()))
        touched.append(float((covered > 0).mean()))
        at = round(RELEASE_DEPTH * item.asked.shape[0]) - 1
        cells = inclusive_cells(item.boxes[0], item.size_px, grid)
        ratios.append(release_ratio(item.asked[at].mean(0), cells))
        chances.append(float(cells.mean()))
        names.append((item.picture, item.index, item.kind))
    if not values:
        reason = f" The first failed so: {first_error}" if errors else " Use data with boxes."
        raise DataError(f"No question with a place could be asked.{reason}")
    array = np.stack(values)
    pictures = [name for name, _, _ in names]
    measures = {name: _figures(array[:, i], pictures, seed) for i, name in enumerate(MEASURES)}
    layer = measures["relative"]["layer"]["layer"]
    release_drawn = bootstrap(np.array([ratios]), pictures, seed)[0]
    return Coverage(
        n=len(values),
        pictures=len(set(pictures)),
        errors=errors,
        reported=int((~choosing_half(pictures)).sum()),
        epsilon=epsilon,
        area=float(np.mean(areas)),
        chance_hit=float(np.mean(touched)),
        measures=measures,
        release={
            "layer": at,
            "depth": depth(at, array.shape[3]),
            "ratio": float(np.mean(ratios)),
            "ratio_interval": list(interval_of(release_drawn)),
            "chance": float(np.mean(chances)),
        },
        per_kind=_per_kind(array[:, 0, :, layer, -1], names),
        rows=_rows(array, names, measures),
        depths=tuple(depth(i, array.shape[3]) for i in range(array.shape[3])),
    )


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
