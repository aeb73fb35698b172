"""Attention coverage: whether attention falls on the answer. Relative maps, lift and hits per layer and head.

The relative map divides the question's map by that of a generic request, so that sinks and fixed preferences of a head
cancel (after the relative attention of arXiv 2502.17422). Layer and head are selected on one half of the images and
reported on the other half, since the best of many heads is biased on the questions that selected it. In all maps the
last two axes are the grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qzoom.config import TokenBudget
from qzoom.data.cells import covered_cells
from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.engine.request import Options
from qzoom.engine.session import Session
from qzoom.errors import DataError, QZoomError
from qzoom.evaluation.methods.attention import GENERIC, need_full_attention, prompt_attention
from qzoom.evaluation.methods.base import start
from qzoom.evaluation.zoomgap import is_negative
from qzoom.model import QZoom
from qzoom.scoring.intervals import bootstrap, interval_of, paired_difference
from qzoom.types import Box


@dataclass(frozen=True, slots=True, eq=False)
class QuestionMaps:
    """One question's attention."""

    picture: str
    index: int
    kind: str
    boxes: tuple[Box, ...]
    size_px: tuple[int, int]  # (width, height) of the picture
    question: np.ndarray  # (layers, heads, rows, columns) of the question
    generic: np.ndarray  # the same of the request that asks for nothing in particular
    error: str | None = None  # why there are no maps; the arrays are empty then


def question_maps(
    model: QZoom,
    task: Task,
    coarse: TokenBudget | None,
    *,
    limit: int | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> Iterator[QuestionMaps]:
    """The maps of every question with a place, picture by picture (ConfigError: a model that pads pictures, or a hybrid
    one). `on_picture`: called with (pictures done, in all) after each."""
    model.engine.backbone.need_bare_grid("Measuring coverage")
    need_full_attention(model.engine.backbone, "Measuring coverage", "name another model")
    plain = QZoom(dataclasses.replace(model.engine, gate=None, region=None), model.name, model.image_limits)
    ids = task.ids if limit is None else task.ids[:limit]
    for number in range(len(ids)):
        yield from _picture_maps(plain, task.sample(number), Options(zoom="never", coarse_tokens=coarse))
        if on_picture is not None:
            on_picture(number + 1, len(ids))


def _picture_maps(model: QZoom, sample: Sample, options: Options) -> Iterator[QuestionMaps]:
    placed = [(i, q) for i, q in enumerate(sample.questions) if q.boxes and not is_negative(q)]
    if not placed:
        return
    none = np.zeros(0)
    session, generic, error, size_px = None, none, sample.error, sample.size_px
    try:
        if error is None:
            session = model.session(sample.image, coarse_tokens=options.coarse_tokens)
            size_px = session.pictures[0].size_px
            generic = _maps(model, session, SampleQuestion("", GENERIC, ""), options)
    except QZoomError as problem:
        session, error = None, str(problem)
    for index, question in placed:
        own, failure = none, error
        if session is not None:
            try:
                own = _maps(model, session, question, options)
            except QZoomError as problem:
                failure = str(problem)
        maps = (own, none if failure else generic)
        yield QuestionMaps(sample.id, index, question.field, question.boxes, size_px, *maps, failure)


def _maps(model: QZoom, session: Session, question: SampleQuestion, options: Options) -> np.ndarray:
    """(layers, heads, rows, columns) float64 of the last prompt token to the first picture's cells."""
    reading = start(model, session, question, options)
    values = prompt_attention(reading, reading.coarse, range(model.engine.backbone.num_layers))
    return np.asarray(values.double().cpu().numpy())


EPSILON = 0.001
"""Added to the generic map before dividing, as a share of its mean, so that cells without attention do not explode."""

MEASURES = ("relative", "raw")
"""Maps that are scored: the question's over the generic one's, and the question's own."""


def relative(question: np.ndarray, generic: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """The question's map over the generic one. `question`: (..., rows, columns), not negative."""
    guard = epsilon * generic.mean((-2, -1), keepdims=True)
    return question / np.maximum(generic + guard, np.finfo(np.float64).tiny)


def lift(values: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Share of a map inside the place over the place's share of the picture; 1 is chance.

    Args:
        values: (..., rows, columns), not negative.
        covered: (rows, columns) from 0 to 1, see `covered_cells`; something must be covered.

    Returns:
        (...,); 0 for a map without attention.
    """
    total = values.sum((-2, -1))
    inside = (values * covered).sum((-2, -1))
    share = np.divide(inside, total, out=np.zeros_like(total), where=total > 0)
    return share / covered.mean()


def pointing(values: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Whether the highest cell (of equal ones the first in reading order) touches the place, 0 or 1.

    Args and returns: as in `lift`.
    """
    flat = values.reshape(*values.shape[:-2], -1)
    return (covered.reshape(-1)[flat.argmax(-1)] > 0).astype(np.float64)


def scores(question: np.ndarray, generic: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Lift and pointing of every head and of the mean over the heads, for both measures.

    Args:
        question: (layers, heads, rows, columns).

    Returns:
        (2 measures, 2 figures, layers, heads + 1) in the order of `MEASURES`, lift before pointing; the last "head" is
        the mean.
    """
    maps = [np.concatenate([m, m.mean(1, keepdims=True)], axis=1).astype(np.float64) for m in (question, generic)]
    both = [relative(maps[0], maps[1]), maps[0]]
    return np.stack([np.stack([lift(m, covered), pointing(m, covered)]) for m in both])


_FIGURES = ("layer_lift", "layer_hit", "head_lift", "head_hit")


def read_coverage(path: Path) -> dict[str, Any]:
    """The figures that a run wrote: coverage.json, or the folder that holds it (DataError: it cannot be read, or is
    something else)."""
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

    Both are figures with rows, as `Coverage.to_dict` gives them.

    Returns:
        `n`, `dropped` (questions that only one run reports), and for each of layer_lift, layer_hit, head_lift,
        head_hit: this, other, difference, interval.

    Raises:
        DataError: no common question.
    """
    mine, theirs = ({(r["picture"], r["index"]): r for r in run["rows"] if r["reported"]} for run in (this, other))
    keys = [key for key in mine if key in theirs]
    if not keys:
        raise DataError("The two runs report no question in common; only runs over the same data can be compared.")
    out: dict[str, Any] = {"n": len(keys), "dropped": len(mine.keys() ^ theirs.keys())}
    pictures = [picture for picture, _ in keys]
    for name in _FIGURES:
        this_values, other_values = ([side[key][name] for key in keys] for side in (mine, theirs))
        out[name] = paired_difference(this_values, other_values, pictures, seed)
    return out


def choosing_half(pictures: Sequence[str]) -> np.ndarray:
    """Which questions choose, (questions,) bool: those of every other picture in an order that only the ids decide
    (DataError: fewer than two pictures)."""
    names = sorted(set(pictures), key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    if len(names) < 2:
        raise DataError("Choosing a layer on one half of the pictures needs two pictures with places or more.")
    chosen = set(names[::2])
    return np.array([name in chosen for name in pictures])


def choose(values: np.ndarray, pictures: Sequence[str], *, of_heads: bool, seed: int = 0) -> dict[str, Any]:
    """The layer, or the head of one, with the highest mean lift on the choosing half.

    Args:
        values: (questions, 2 figures, layers, heads + 1) of one measure, see `scores`.
        of_heads: choose among single heads instead of means over a layer's heads.

    Returns:
        `layer` and `head` (indices from 0; None for the mean over the layer's heads), `depth` (share of the layers up
        to and with this one); on the half that did not choose `lift` and `hit`, each with its 95 % interval (drawn by
        picture) as `lift_interval` and `hit_interval`; and `lift_when_chosen`, on the half that chose it.

    Raises:
        DataError: fewer than two pictures.
    """
    choosing = choosing_half(pictures)
    candidates = values[..., :-1] if of_heads else values[..., -1:]
    means = candidates[choosing, 0].mean(0)
    layer, head = (int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    kept = candidates[~choosing][:, :, layer, head]
    names = [name for name, left_out in zip(pictures, ~choosing, strict=True) if left_out]
    lifts, hits = bootstrap(kept.T, names, seed)
    return {
        "layer": layer,
        "head": head if of_heads else None,
        "depth": depth(layer, values.shape[2]),
        "lift": float(kept[:, 0].mean()),
        "lift_interval": interval_of(lifts),
        "hit": float(kept[:, 1].mean()),
        "hit_interval": interval_of(hits),
        "lift_when_chosen": float(means[layer, head]),
    }


def depth(layer: int, layers: int) -> float:
    """Share of the layers up to and with this one."""
    return (layer + 1) / layers


@dataclass(frozen=True, slots=True, eq=False)
class Coverage:
    """The figures of one run."""

    n: int  # questions with a place
    pictures: int  # how many pictures they are about
    errors: int  # questions that could not be asked; they have no maps and are in no figure
    reported: int  # questions of the half that did not choose
    area: float  # mean share of the picture that a place covers
    chance_hit: float  # mean share of the cells that a place touches: what pointing at random would hit
    # per name in `MEASURES`: "layer" and "head" as chosen, and the curves over all layers of the whole run: "lift" and
    # "hit" of the mean over the heads, "best_lift" of each layer's best head
    measures: dict[str, dict[str, Any]]
    # n and the chosen layer's relative lift and hit per field, on the reported half
    per_kind: dict[str, dict[str, Any]]
    # per question its picture, number and the values at the chosen places, for comparisons
    rows: tuple[dict[str, Any], ...]
    depths: tuple[float, ...]  # of every layer

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """JSON types, with or without every question."""
        return {f.name: getattr(self, f.name) for f in fields(self) if rows or f.name != "rows"}


def measure_coverage(maps: Iterable[QuestionMaps], *, seed: int = 0) -> Coverage:
    """The figures of a run (DataError: fewer than two pictures with places that could be asked about)."""
    names: list[tuple[str, int, str]] = []
    values, areas, touched = [], [], []
    failures: list[str] = []
    for item in maps:
        covered = np.zeros(0)
        if item.error is None:
            covered = covered_cells(item.boxes, item.size_px, item.question.shape[2:])
        if not covered.any():
            failures.append(item.error or f"a box about {item.picture!r} lies outside the picture.")
            continue
        names.append((item.picture, item.index, item.kind))
        values.append(scores(item.question, item.generic, covered))
        areas.append(covered.mean())
        touched.append((covered > 0).mean())
    if not names:
        reason = f" The first failed so: {failures[0]}" if failures else " Use data with boxes."
        raise DataError(f"No question with a place could be asked.{reason}")
    array, pictures = np.stack(values), [picture for picture, _, _ in names]
    measures = {name: _figures(array[:, i], pictures, seed) for i, name in enumerate(MEASURES)}
    return Coverage(
        n=len(names),
        pictures=len(set(pictures)),
        errors=len(failures),
        reported=int((~choosing_half(pictures)).sum()),
        area=float(np.mean(areas)),
        chance_hit=float(np.mean(touched)),
        measures=measures,
        per_kind=_per_kind(array[:, 0, :, measures["relative"]["layer"]["layer"], -1], names),
        rows=_rows(array, names, measures),
        depths=tuple(depth(i, array.shape[3]) for i in range(array.shape[3])),
    )


def _figures(values: np.ndarray, pictures: Sequence[str], seed: int) -> dict[str, Any]:
    """One measure's chosen places and curves; `values` is (questions, 2 figures, layers, heads + 1)."""
    means = values.mean(0)
    return {
        "layer": choose(values, pictures, of_heads=False, seed=seed),
        "head": choose(values, pictures, of_heads=True, seed=seed),
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
