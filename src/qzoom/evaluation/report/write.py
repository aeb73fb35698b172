"""Make a report: read the runs, measure, draw, and write page, Markdown, charts and figures. The same runs give the
same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qzoom.errors import DataError
from qzoom.evaluation.report.charts import write_png
from qzoom.evaluation.report.figures import TaskFigures, measure
from qzoom.evaluation.report.gallery import Card, failures, pick_run
from qzoom.evaluation.report.page import render_page
from qzoom.evaluation.report.runs import group_runs, read_runs
from qzoom.evaluation.report.words import markdown, software

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Args:
        folder: where.
        files: names in it.
        tasks: the figures.
    """

    folder: Path
    files: tuple[str, ...]
    tasks: tuple[TaskFigures, ...]


def write_report(
    places: Sequence[Path],
    folder: Path,
    *,
    title: str = "What zooming buys",
    data: Path | None = None,
    failures_each: int = 4,
    seed: int = 0,
    page: Path | None = None,
) -> Report:
    """Write report.html, report.md, report.json and a chart for every task.

    Args:
        places: answer files, or folders of them.
        folder: where to write; it is made.
        title: of the page.
        data: folder of the pictures of tasks that read files, for the gallery.
        failures_each: most failures of a kind in the gallery.
        seed: of the intervals' draws.
        page: also write the Markdown here, with paths to the charts.

    Raises:
        DataError: no answers, or files that hold something else, or a folder that cannot be written.
    """
    runs = read_runs(places)
    groups = group_runs(runs)
    tasks = [measure(group, seed) for group in groups]
    galleries: list[tuple[str, list[Card]]] = []
    for group in groups:
        run = pick_run(group)
        label = group.labels[group.runs.index(run)] if run is not None else ""
        galleries.append((label, failures(group, run, failures_each, data) if run is not None else []))
    ran = software([run.about for run in runs])
    methods = sorted({line.method for task in tasks for line in task.runs})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        charts = {f"{i}-{t.name}": f"{i}-{_plain(t.name)}.png" for i, t in enumerate(tasks, start=1)}
        for task, name in zip(tasks, charts.values(), strict=True):
            write_png(task, methods, folder / name)
        _write(folder / "report.html", render_page(title, tasks, ran, galleries))
        _write(folder / "report.md", markdown(title, tasks, ran, charts))
        figures = {"title": title, "ran": ran, "seed": seed, "tasks": [task.to_dict() for task in tasks]}
        _write(folder / "report.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            base = Path(os.path.relpath(folder, page.parent))
            _write(page, markdown(title, tasks, ran, {key: (base / name).as_posix() for key, name in charts.items()}))
    except OSError as error:
        where = error.filename or folder
        raise DataError(f"{where} cannot be written ({error.strerror or error}); check space and rights.") from error
    return Report(folder, ("report.html", "report.md", "report.json", *charts.values()), tuple(tasks))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "task"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
