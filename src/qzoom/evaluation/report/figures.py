"""The figures of a report: means with intervals, differences of pairs, fronts. Pure and seeded.

Questions about one picture are not independent, so intervals come from drawing pictures, not questions, with
replacement. Every run is scored on the same draws, so that differences are those of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qzoom.evaluation.intervals import bootstrap, interval_of
from qzoom.evaluation.metrics import hit
from qzoom.evaluation.records import AnswerRow
from qzoom.evaluation.report.runs import Run, TaskRuns
from qzoom.evaluation.score import row_score

__all__ = ["COSTS", "RunFigures", "TaskFigures", "bootstrap", "front", "measure"]

COSTS = {
    "seconds": "seconds per question",
    "visual_tokens": "visual tokens per question",
    "gflops": "GFLOPs per question",
}
"""Names of the costs and how they read."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One line of the table; shares from 0 to 1, None for a share of nothing.

    Args:
        label: the run's name in its task.
        method: how it looked.
        model: whose answers.
        caps: most tokens of the coarse look and of the regions.
        accuracy: mean of the task's metric.
        interval: its 95 % interval.
        difference: accuracy less that of the best plain run.
        difference_interval: its 95 % interval, by pairs; None without a plain run.
        zoomed: share of questions for which a region was read.
        hit_rate: of the zooms on questions with known places, the share that holds one.
        seconds, visual_tokens, gflops: means.
        errors: questions that failed and count as wrong.
    """

    label: str
    method: str
    model: str
    caps: tuple[int | None, int | None]
    accuracy: float
    interval: tuple[float, float]
    difference: float | None
    difference_interval: tuple[float, float] | None
    zoomed: float
    hit_rate: float | None
    seconds: float
    visual_tokens: float
    gflops: float | None
    errors: int

    def cost(self, name: str) -> float | None:
        """One of `COSTS`."""
        value = getattr(self, name)
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """All figures of one task.

    Args:
        name: of the task.
        questions: how many.
        pictures: how many.
        dropped: pictures that not every run answered.
        runs: in order.
        best_plain: label of the most accurate plain run, which the others are compared with; None without one.
        fronts: for each cost the labels of the runs that no other beats in both.
        equal_accuracy: the cheapest zooming run at least as accurate as the best plain one, and its savings; None when
            there is none.
        equal_budget: zooming runs beside the plain run of the same total, with the difference by pairs.
    """

    name: str
    questions: int
    pictures: int
    dropped: int
    runs: tuple[RunFigures, ...]
    best_plain: str | None
    fronts: dict[str, tuple[str, ...]]
    equal_accuracy: dict[str, Any] | None
    equal_budget: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def measure(group: TaskRuns, seed: int = 0) -> TaskFigures:
    """The figures of one task.

    Args:
        group: its runs.
        seed: of the draws.
    """
    scores = np.array([[row_score(row) for row in run.rows] for run in group.runs])
    names = [row.picture for row in group.runs[0].rows]
    drawn = bootstrap(scores, names, seed)
    means, labels = scores.mean(1), group.labels
    plains = [i for i, run in enumerate(group.runs) if run.method == "plain"]
    best = min(plains, key=lambda i: (-means[i], _mean_tokens(group.runs[i]))) if plains else None
    lines = []
    for i, (run, label) in enumerate(zip(group.runs, labels, strict=True)):
        difference = None if best is None else float(means[i] - means[best])
        interval = None if best is None else interval_of(drawn[i] - drawn[best])
        lines.append(_line(run, label, float(means[i]), interval_of(drawn[i]), difference, interval))
    return TaskFigures(
        name=group.name,
        questions=len(names),
        pictures=len(set(names)),
        dropped=group.dropped,
        runs=tuple(lines),
        best_plain=None if best is None else labels[best],
        fronts={cost: front(lines, cost) for cost in COSTS},
        equal_accuracy=None if best is None else _equal_accuracy(lines, lines[best]),
        equal_budget=tuple(_equal_budget(group, lines, means, drawn)),
    )


def front(lines: Sequence[RunFigures], cost: str) -> tuple[str, ...]:
    """Labels of the runs that no other run matches or beats in accuracy and cost and beats in one, cheapest first."""
    known = [(price, line.accuracy, line.label) for line in lines if (price := line.cost(cost)) is not None]
    kept = []
    for price, accuracy, label in known:
        beaten = any(p <= price and a >= accuracy and (p < price or a > accuracy) for p, a, _ in known)
        if not beaten:
            kept.append((price, accuracy, label))
    return tuple(label for _, _, label in sorted(kept))


def _line(
    run: Run,
    label: str,
    accuracy: float,
    interval: tuple[float, float],
    difference: float | None,
    difference_interval: tuple[float, float] | None,
) -> RunFigures:
    rows = run.rows
    placed = [row for row in rows if row.zoomed and row.boxes]
    hits = sum(hit([region.box for region in row.regions], row.boxes) for row in placed)
    operations = [cost for row in rows if (cost := run.gflops(row)) is not None]
    return RunFigures(
        label=label,
        method=run.method,
        model=run.model,
        caps=run.caps,
        accuracy=accuracy,
        interval=interval,
        difference=difference,
        difference_interval=difference_interval,
        zoomed=sum(row.zoomed for row in rows) / len(rows),
        hit_rate=hits / len(placed) if placed else None,
        seconds=float(np.mean([row.seconds for row in rows])),
        visual_tokens=_mean_tokens(run),
        gflops=float(np.mean(operations)) if operations else None,
        errors=sum(row.error is not None for row in rows),
    )


def _mean_tokens(run: Run) -> float:
    answered: list[AnswerRow] = [row for row in run.rows if row.error is None]
    tokens = [row.usage.coarse_tokens + row.usage.region_tokens for row in answered]
    return float(np.mean(tokens)) if tokens else 0.0


def _equal_accuracy(lines: Sequence[RunFigures], plain: RunFigures) -> dict[str, Any] | None:
    """The cheapest of the model's own zooming runs that is at least as accurate as the best plain run."""
    able = [line for line in lines if line.method in ("qzoom", "always") and line.accuracy >= plain.accuracy]
    able = [line for line in able if line.model == plain.model]
    if not able:
        return None
    best = min(able, key=lambda line: (line.seconds, line.visual_tokens))
    return {
        "run": best.label,
        "plain": plain.label,
        "accuracy": best.accuracy,
        "plain_accuracy": plain.accuracy,
        "throughput": plain.seconds / best.seconds if best.seconds else None,
        "tokens_saved": 1 - best.visual_tokens / plain.visual_tokens if plain.visual_tokens else None,
    }


def _equal_budget(
    group: TaskRuns, lines: Sequence[RunFigures], means: np.ndarray, drawn: np.ndarray
) -> list[dict[str, Any]]:
    plain = {(run.model, run.total_cap): i for i, run in enumerate(group.runs) if run.method == "plain"}
    out = []
    for i, run in enumerate(group.runs):
        other = plain.get((run.model, run.total_cap))
        if run.method not in ("qzoom", "always") or run.total_cap is None or other is None:
            continue
        out.append(
            {
                "cap": run.total_cap,
                "run": lines[i].label,
                "plain": lines[other].label,
                "difference": float(means[i] - means[other]),
                "interval": interval_of(drawn[i] - drawn[other]),
                "throughput": lines[other].seconds / lines[i].seconds if lines[i].seconds else None,
            }
        )
    return sorted(out, key=lambda item: (item["cap"], item["run"]))
