"""The figures as words and tables: what page and Markdown both say, and the Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qzoom.evaluation.report.figures import RunFigures, TaskFigures

__all__ = ["COLUMNS", "NOTE", "cells", "findings", "markdown", "percent", "software", "times"]

NOTE = (
    "Shares are per cent. Intervals hold in 95 % of cases and come from drawing pictures with replacement; differences "
    "are those of pairs, against the most accurate plain run. `hit`: of the zooms on questions with known places, "
    "those whose region holds one. `tokens`, `GFLOPs`, `seconds`: means per question; FLOPs are computed from the "
    "model's sizes as if every question were asked alone, seconds are those of the run. Failures count as wrong."
)
"""How to read the figures."""

FEW_PICTURES = 30
"""Drawing from fewer pictures than this understates how much another set of pictures would differ."""

COLUMNS = (
    "Run",
    "accuracy",
    "95 %",
    "against plain",
    "95 %",
    "zoomed",
    "hit",
    "tokens",
    "GFLOPs",
    "seconds",
    "failed",
)


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share in per cent; a dash for a share of nothing."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def times(value: float | None) -> str:
    """A ratio; a dash where nothing can be divided."""
    return "–" if value is None else f"{value:.2f} times"


def cells(line: RunFigures) -> tuple[str, ...]:
    """A run's line of the table, under `COLUMNS`."""
    low, high = line.interval
    other = line.difference_interval
    return (
        line.label,
        percent(line.accuracy),
        f"{percent(low)} to {percent(high)}",
        percent(line.difference, sign=True),
        "–" if other is None else f"{percent(other[0], sign=True)} to {percent(other[1], sign=True)}",
        percent(line.zoomed),
        percent(line.hit_rate),
        f"{line.visual_tokens:.0f}",
        "–" if line.gflops is None else f"{line.gflops:.3g}",
        f"{line.seconds:.3f}",
        str(line.errors),
    )


def findings(task: TaskFigures) -> list[str]:
    """What the figures say, one sentence each."""
    out = []
    equal = task.equal_accuracy
    if equal is not None:
        out.append(
            f"Equal accuracy: “{equal['run']}” reaches {percent(equal['accuracy'])} % against "
            f"{percent(equal['plain_accuracy'])} % of the best plain run (“{equal['plain']}”) at "
            f"{times(equal['throughput'])} its throughput with {percent(equal['tokens_saved'])} % fewer visual tokens."
        )
    elif task.best_plain is not None and any(line.method in ("qzoom", "always") for line in task.runs):
        out.append(f"Equal accuracy: no zooming run reaches the best plain run (“{task.best_plain}”).")
    for item in task.equal_budget:
        low, high = (percent(side, sign=True) for side in item["interval"])
        out.append(
            f"Equal budget of {item['cap']} tokens: “{item['run']}” {percent(item['difference'], sign=True)} points "
            f"({low} to {high}) at {times(item['throughput'])} the throughput."
        )
    for cost, name in (("seconds", "seconds"), ("visual_tokens", "visual tokens"), ("gflops", "FLOPs")):
        if task.fronts[cost]:
            out.append(f"On the front of accuracy against {name}: {', '.join(f'“{r}”' for r in task.fronts[cost])}.")
    if task.pictures < FEW_PICTURES:
        out.append(f"Only {task.pictures} pictures: the intervals are too narrow to be relied on.")
    if task.dropped:
        out.append(f"{task.dropped} pictures that not every run answered are left out.")
    return out


def software(about: Sequence[dict[str, Any]]) -> str:
    """Models and library versions of the runs, each once."""
    names = dict.fromkeys(
        ", ".join(
            [f"model {a.get('model', '?')}", *(f"{k} {a[k]}" for k in ("qzoom", "torch", "transformers") if k in a)]
        )
        for a in about
    )
    return "; ".join(names)


def markdown(title: str, tasks: Sequence[TaskFigures], ran: str, pictures: dict[str, str]) -> str:
    """The report as Markdown.

    Args:
        title: of the page.
        tasks: the figures.
        ran: from `software`.
        pictures: path of each task's chart, by its number and name.
    """
    parts = [f"# {title}\n", f"{NOTE}\n", f"Ran with {ran}. Made by `qzoom report`.\n"]
    for number, task in enumerate(tasks, start=1):
        parts.append(f"## {task.name.capitalize()}\n")
        parts.append(f"{task.questions} questions about {task.pictures} pictures.\n")
        chart = pictures.get(f"{number}-{task.name}")
        if chart:
            parts.append(f"![{task.name}: accuracy against seconds, visual tokens and FLOPs]({chart})\n")
        rows = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *(list(cells(line)) for line in task.runs)]
        parts.append(
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"
        )
        parts += [f"- {sentence}" for sentence in findings(task)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"
