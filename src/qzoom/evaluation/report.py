"""Write a report of several evaluations: figures, charts of accuracy against cost, and examples of failures.

The page is self-contained: its style and images are embedded, and it has no scripts. The same runs give the same bytes.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import Image, ImageDraw

from qzoom.data.benchmarks.registry import open_synthetic
from qzoom.data.questions import DRAWN, read_receipts, task_folder
from qzoom.data.samples import AnswerRow
from qzoom.errors import DataError, QZoomError, listed
from qzoom.evaluation.report_figures import (
    COSTS,
    ZOOMING,
    Run,
    RunFigures,
    TaskFigures,
    TaskRuns,
    group_runs,
    measure,
    read_runs,
)
from qzoom.evaluation.score import row_score
from qzoom.evaluation.tables import interval, log_ticks, markdown_table, new_figure, percent, save_figure, times
from qzoom.images.geometry import scale_box
from qzoom.images.load import load_image
from qzoom.plots.overlay import draw_boxes
from qzoom.scoring.metrics import hit
from qzoom.store.log import write_atomic

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
    *("Run", "accuracy", "95 %", "against plain", "95 %", "zoomed"),
    *("hit", "tokens", "GFLOPs", "seconds", "failed"),
)


def cells(line: RunFigures) -> tuple[str, ...]:
    """A run's line of the table, under `COLUMNS`."""
    return (
        line.label,
        percent(line.accuracy),
        interval(line.interval, sign=False),
        percent(line.difference, sign=True),
        interval(line.difference_interval),
        percent(line.zoomed),
        percent(line.hit_rate),
        f"{line.visual_tokens:.0f}",
        "–" if line.gflops is None else f"{line.gflops:.3g}",
        f"{line.seconds:.3f}",
        str(line.errors),
    )


def findings(task: TaskFigures) -> list[str]:
    """The results of a task, one sentence each."""
    out = []
    equal = task.equal_accuracy
    if equal is not None:
        out.append(
            f"Equal accuracy: “{equal['run']}” reaches {percent(equal['accuracy'])} % against "
            f"{percent(equal['plain_accuracy'])} % of the best plain run (“{equal['plain']}”) at "
            f"{times(equal['throughput'])} its throughput with {_saved(equal['tokens_saved'])} visual tokens."
        )
    elif task.best_plain is not None and any(line.method in ZOOMING for line in task.runs):
        out.append(f"Equal accuracy: no zooming run reaches the best plain run (“{task.best_plain}”).")
    for item in task.equal_budget:
        out.append(
            f"Equal budget of {item['cap']} tokens: “{item['run']}” {percent(item['difference'], sign=True)} points "
            f"({interval(item['interval'])}) at {times(item['throughput'])} the throughput."
        )
    for cost, name in (("seconds", "seconds"), ("visual_tokens", "visual tokens"), ("gflops", "FLOPs")):
        if task.fronts[cost]:
            out.append(f"On the front of accuracy against {name}: {', '.join(f'“{r}”' for r in task.fronts[cost])}.")
    for option, values in task.mixed.items():
        shown = ", ".join("not stored" if value is None else str(value) for value in values)
        out.append(f"The runs differ in {option} as well ({shown}): differences between them are also due to that.")
    if task.pictures < FEW_PICTURES:
        out.append(f"Only {task.pictures} pictures: the intervals are too narrow to be relied on.")
    if task.dropped:
        out.append(f"{task.dropped} pictures that not every run answered are left out.")
    return out


def _saved(share: float | None) -> str:
    """A share of visual tokens saved, in words; a negative one is a surplus."""
    return f"{percent(None if share is None else abs(share))} % {'more' if (share or 0) < 0 else 'fewer'}"


def _software(about: Sequence[Mapping[str, Any]]) -> str:
    """Models and library versions of the runs, each once."""
    names = dict.fromkeys(
        ", ".join(
            [f"model {a.get('model', '?')}", *(f"{k} {a[k]}" for k in ("qzoom", "torch", "transformers") if k in a)]
        )
        for a in about
    )
    return "; ".join(names)


def _markdown(title: str, tasks: Sequence[TaskFigures], software: str, charts: Sequence[str]) -> str:
    """The report as Markdown; `charts` are the paths of the tasks' charts."""
    parts = [f"# {title}\n", f"{NOTE}\n", f"Ran with {software}. Made by `qzoom report`.\n"]
    for task, chart in zip(tasks, charts, strict=True):
        parts.append(f"## {task.name.capitalize()}\n")
        parts.append(f"{task.questions} questions about {task.pictures} pictures.\n")
        parts.append(f"![{task.name}: accuracy against seconds, visual tokens and FLOPs]({chart})\n")
        parts.append(markdown_table([COLUMNS, *map(cells, task.runs)]))
        parts += [f"- {sentence}" for sentence in findings(task)]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


_COLOURS = {"qzoom": "#de5426", "plain": "#47628c", "always": "#188a76", "oracle": "#6b7280"}
_OTHERS = ("#804ec4", "#b27d08", "#b8336a", "#2f7fb8")


def plot_task(task: TaskFigures, methods: Sequence[str], path: Path) -> Path:
    """Draw accuracy against every cost, side by side.

    Every method is a line through its budgets; whiskers are 95 % intervals; runs on the front carry a ring.

    Returns:
        The path written.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    others = sorted(set(methods) - set(_COLOURS))
    colours = _COLOURS | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    costs = [cost for cost in COSTS if any((line.cost(cost) or 0) > 0 for line in task.runs)] or ["visual_tokens"]
    figure, panels = new_figure(len(costs))
    for axes, cost in zip(panels, costs, strict=True):
        priced = sorted(((price, line) for line in task.runs if (price := line.cost(cost))), key=lambda pair: pair[0])
        series: dict[tuple[str, str], list[tuple[float, RunFigures]]] = {}
        for price, line in priced:
            series.setdefault((line.model, line.method), []).append((price, line))
        for (model, method), members in series.items():
            first = model == task.runs[0].model
            x, y = [price for price, _ in members], [line.accuracy for _, line in members]
            below = [max(0.0, line.accuracy - line.interval[0]) for _, line in members]
            above = [max(0.0, line.interval[1] - line.accuracy) for _, line in members]
            label, style = (method, "-") if first else (f"{method}, {model}", "--")
            axes.errorbar(x, y, yerr=[below, above], color=colours[method], elinewidth=1, ls=style)
            axes.plot(x, y, "o", color=colours[method], label=label)
            front = [(price, line.accuracy) for price, line in members if line.label in task.fronts[cost]]
            if front:
                axes.plot(*zip(*front, strict=True), "o", ms=12, mfc="none", mec=colours[method])
        axes.set(xlabel=COSTS[cost], ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if priced:
            low, high = math.log(priced[0][0]), math.log(priced[-1][0])
            spare = max(0.15, 0.08 * (high - low))
            axes.set(xscale="log", xlim=(math.exp(low - spare), math.exp(high + spare)))
            axes.xaxis.set_major_locator(FixedLocator(log_ticks(math.exp(low - spare), math.exp(high + spare))))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(task.name)
    return save_figure(figure, path)


KINDS = {
    "misread": "Looked at the right place and read it wrongly",
    "beside": "Looked beside the place",
    "unknown": "Zoomed; the place is not known",
    "coarse": "Did not zoom",
    "failed": "Could not be asked",
}
_PAGE_PX = (520, 420)
_CROP_PX = (520, 150)
_PLACE = (24, 138, 118)


@dataclass(frozen=True, slots=True)
class Card:
    """One failure."""

    kind: str
    row: AnswerRow
    # the page with what was read (orange) and the known places (green), the region enlarged below it, as base64; empty
    # without the picture
    jpeg: str


def failure_kind(row: AnswerRow) -> str:
    """Where a wrong answer went wrong; a key of `KINDS`."""
    if row.error is not None:
        return "failed"
    if not row.zoomed:
        return "coarse"
    if not row.boxes:
        return "unknown"
    return "misread" if hit([region.box for region in row.regions], row.boxes) else "beside"


def failures(group: TaskRuns, run: Run, count: int, files: Mapping[str, Path] | None = None) -> list[Card]:
    """Some failures of every kind, from different pictures, spread evenly over the run. `files`: pictures by id, for
    tasks that read files."""
    wrong: dict[str, dict[str, AnswerRow]] = {kind: {} for kind in KINDS}
    for row in run.rows:
        if row_score(row) == 0:
            wrong[failure_kind(row)].setdefault(row.picture, row)
    files = files or {}
    cards = []
    for kind, rows in wrong.items():
        every = list(rows.values())
        chosen = [every[i * len(every) // count] for i in range(count)] if len(every) > count else every
        cards += [Card(kind, row, _drawn(_picture(group.questions, files, row.picture), row)) for row in chosen]
    return cards


def _picture_files(questions: Mapping[str, Any], data: Path | None) -> dict[str, Path]:
    """Pictures of a question file by id; none if `data` does not hold the file that was asked."""
    if data is None or "split" not in questions or "sha256" not in questions:
        return {}
    try:
        task = read_receipts(task_folder(data, str(questions.get("task"))), str(questions["split"]))
    except QZoomError:
        return {}
    same = task.identity["sha256"] == questions["sha256"]
    return {s.id: s.image for s in task if isinstance(s.image, Path)} if same else {}


def _files_of(groups: Sequence[TaskRuns], data: Path | None) -> list[dict[str, Path]]:
    """The picture files of every task (DataError: a folder that is named holds the questions of none)."""
    files = [_picture_files(group.questions, data) for group in groups]
    if data is None or any(files):
        return files
    asked = [f"{group.questions['split']}.jsonl" for group in groups if "sha256" in group.questions]
    if not asked:
        raise DataError(f"{data}: these answers are not about a question file; leave --data out.")
    raise DataError(f"{data} does not hold the questions of these answers ({listed(asked)}); name their folder.")


def _picture(questions: Mapping[str, Any], files: Mapping[str, Path], name: str) -> PIL.Image.Image | None:
    """A picture drawn or read again; None where it cannot be found."""
    kind, _, number = name.rpartition("-")
    source: Any = files.get(name)
    try:
        if questions.get("task") in DRAWN and kind == questions["task"] and number.isdigit():
            source = open_synthetic(kind, int(number), 1).sample(0).image
        return None if source is None else load_image(source).image
    except QZoomError:
        return None


def _drawn(picture: PIL.Image.Image | None, row: AnswerRow) -> str:
    """Page and enlarged region as a base64 JPEG."""
    if picture is None:
        return ""
    page = _within(picture.convert("RGB"), _PAGE_PX)
    draw = ImageDraw.Draw(page)
    for place in row.boxes:
        x0, y0, x1, y1 = scale_box(place, picture.size, page.size)
        draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=_PLACE, width=2)
    page, _ = draw_boxes(page, [region.box for region in row.regions], picture.size, numbered=len(row.regions) > 1)
    if row.regions:
        crop = _within(picture.convert("RGB").crop(row.regions[0].box), _CROP_PX, largest=4)
        whole = Image.new("RGB", (max(page.width, crop.width), page.height + 8 + crop.height), (255, 255, 255))
        whole.paste(page, ((whole.width - page.width) // 2, 0))
        whole.paste(crop, ((whole.width - crop.width) // 2, page.height + 8))
        page = whole
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _within(image: PIL.Image.Image, room: Sequence[int], *, largest: float = 1) -> PIL.Image.Image:
    """The picture scaled to fit, enlarged at most by `largest`."""
    scale = min(room[0] / image.width, room[1] / image.height, largest)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _section(task: TaskFigures, chart: Path, run: str, cards: Sequence[Card]) -> dict[str, Any]:
    """One task's part of the page, with failures of the run named."""
    return {
        "task": task,
        "headline": _headline(task),
        "chart": base64.b64encode(chart.read_bytes()).decode("ascii"),
        "findings": findings(task),
        "rows": [cells(line) for line in task.runs],
        "run": run,
        "cards": cards,
    }


def _headline(task: TaskFigures) -> list[tuple[str, str]]:
    """The savings at equal accuracy and the gain over the best plain run: large numbers and what they are."""
    numbers = []
    equal = task.equal_accuracy
    if equal is not None:
        ratio = times(equal["throughput"]).replace(" times", "×")
        numbers.append((ratio, "throughput at the best plain run's accuracy"))
        saved = equal["tokens_saved"]
        change = "–" if saved is None else f"{'−' if saved >= 0 else '+'}{percent(abs(saved))} %"
        numbers.append((change, "visual tokens at the best plain run's accuracy"))
    gains = [line.difference for line in task.runs if line.method in ZOOMING and line.difference is not None]
    if gains:
        numbers.append((percent(max(gains), sign=True), "points: best zooming run against best plain run"))
    return numbers


def _page(title: str, software: str, sections: Sequence[Mapping[str, Any]]) -> str:
    """The whole page; the template escapes every text."""
    import jinja2

    text = importlib.resources.files("qzoom.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return page.render(title=title, software=software, note=NOTE, columns=COLUMNS, kinds=KINDS, sections=sections)


def write_report(
    places: Sequence[Path],
    folder: Path,
    *,
    title: str = "What zooming buys",
    data: Path | None = None,
    failures_each: int = 4,
    seed: int = 0,
    page: Path | None = None,
) -> list[TaskFigures]:
    """Write report.html, report.md, report.json and a chart for every task.

    Args:
        places: answer files, or folders of them.
        data: folder of the pictures of tasks that read files, for the gallery.
        page: also write the Markdown here, with paths to the charts.

    Raises:
        DataError: no answers, files that hold something else, `data` without the questions of these answers, or a
            folder that cannot be written.
    """
    runs = read_runs(places)
    groups = group_runs(runs)
    files = _files_of(groups, data)
    tasks = [measure(group, seed) for group in groups]
    software = _software([run.about for run in runs])
    methods = sorted({line.method for task in tasks for line in task.runs})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        charts, sections = [], []
        for number, (group, task, pictures) in enumerate(zip(groups, tasks, files, strict=True), start=1):
            name = re.sub(r"[^a-z0-9]+", "-", task.name.lower()).strip("-") or "task"
            charts.append(plot_task(task, methods, folder / f"{number}-{name}.png"))
            own = [run for run in group.runs if run.method in ZOOMING] or list(group.runs)
            shown = max(own, key=lambda run: sum(map(row_score, run.rows)))
            cards = failures(group, shown, failures_each, pictures)
            sections.append(_section(task, charts[-1], group.labels[group.runs.index(shown)], cards))
        write_atomic(folder / "report.html", _page(title, software, sections))
        write_atomic(folder / "report.md", _markdown(title, tasks, software, [chart.name for chart in charts]))
        figures = {"title": title, "ran": software, "seed": seed, "tasks": [task.to_dict() for task in tasks]}
        write_atomic(folder / "report.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            paths = [Path(os.path.relpath(chart, page.parent)).as_posix() for chart in charts]
            write_atomic(page, _markdown(title, tasks, software, paths))
    except OSError as error:
        where = error.filename or folder
        raise DataError(f"{where} cannot be written ({error.strerror or error}); check space and rights.") from error
    return tasks
