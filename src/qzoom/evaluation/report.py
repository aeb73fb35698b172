"""The figures as words and tables: what page and Markdown both say, and the Markdown.

Accuracy against a cost as a drawing: SVG for the page (it follows the page's colours), the same as PNG.

Every method is a line through its budgets; whiskers are 95 % intervals; runs on the front carry a ring.

Failures to look at: what a zooming run got wrong, by where it went wrong, with what it read outlined.

Pictures are drawn or read again from the task; those that cannot be found leave their card without a picture.

The report as one HTML page that needs nothing else: own styles, inline drawings, embedded pictures, no scripts.

Make a report: read the runs, measure, draw, and write page, Markdown, charts and figures. The same runs give the
same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.data.samples import AnswerRow
from qzoom.errors import DataError, QZoomError
from qzoom.evaluation.report_figures import (
    COSTS,
    Run,
    RunFigures,
    TaskFigures,
    TaskRuns,
    group_runs,
    measure,
    read_runs,
)
from qzoom.evaluation.score import row_score
from qzoom.scoring.metrics import hit

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "COLOURS",
    "COLUMNS",
    "KINDS",
    "NOTE",
    "Card",
    "Report",
    "cells",
    "colour_of",
    "failure_kind",
    "failures",
    "findings",
    "markdown",
    "percent",
    "pick_run",
    "render_page",
    "software",
    "svg_chart",
    "times",
    "write_png",
    "write_report",
]


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


COLOURS = {
    "qzoom": ("#de5426", "#ff8a5c"),
    "plain": ("#47628c", "#8fb0e3"),
    "always": ("#188a76", "#4fd0b9"),
    "oracle": ("#6b7280", "#a7adba"),
}
"""Colour of a method on light and on dark paper."""
_OTHERS = (("#804ec4", "#b592f0"), ("#b27d08", "#e8b84a"), ("#b8336a", "#f07fae"), ("#2f7fb8", "#71bdf0"))
_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 52


def colour_of(method: str, methods: Sequence[str]) -> tuple[str, str]:
    """A method's colours, the same in every chart of a report.

    Args:
        method: whose.
        methods: all of the report.
    """
    if method in COLOURS:
        return COLOURS[method]
    others = sorted(set(methods) - set(COLOURS))
    return _OTHERS[others.index(method) % len(_OTHERS)]


def svg_chart(task: TaskFigures, cost: str, methods: Sequence[str]) -> str:
    """One chart as inline SVG; empty when no run has this cost.

    Args:
        task: the figures.
        cost: a name in `COSTS`.
        methods: all of the report, for the colours.
    """
    shown = [line for line in task.runs if (line.cost(cost) or 0) > 0]
    if not shown:
        return ""
    axes = _Axes(shown, cost)
    words = html.escape(f"{task.name}: accuracy against {COSTS[cost]}")
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}">',
        *axes.grid(),
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(COSTS[cost])}</text>",
    ]
    for (model, method), members in _series(shown, cost).items():
        name = f"m-{method}"
        path = " ".join(f"{axes.x(line.cost(cost)):.1f},{axes.y(line.accuracy):.1f}" for line in members)
        dashes = ' stroke-dasharray="5 4"' if model != shown[0].model else ""
        parts.append(f'<polyline class="line {name}" points="{path}"{dashes}/>')
        for line in members:
            parts += _mark(axes, line, cost, name, line.label in task.fronts[cost])
    return "".join([*parts, "</svg>"])


def _mark(axes: _Axes, line: RunFigures, cost: str, name: str, on_front: bool) -> list[str]:
    x, y = axes.x(line.cost(cost)), axes.y(line.accuracy)
    low, high = (axes.y(side) for side in line.interval)
    words = (
        f"{line.label}: {line.accuracy:.1%} ({line.interval[0]:.1%} to {line.interval[1]:.1%}), {line.cost(cost):.4g}"
    )
    ring = [f'<circle class="ring {name}" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'] if on_front else []
    return [
        f'<g><title>{html.escape(words)}</title><line class="whisker {name}" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{low:.1f}" y2="{high:.1f}"/>',
        *ring,
        f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>',
    ]


class _Axes:
    """Costs on a logarithmic axis, accuracy on a straight one.

    Args:
        lines: what must fit.
        cost: a name in `COSTS`.
    """

    def __init__(self, lines: Sequence[RunFigures], cost: str) -> None:
        costs = [math.log(value) for line in lines if (value := line.cost(cost))]
        spare = max(0.15, 0.08 * (max(costs) - min(costs)))
        self.low, self.high = min(costs) - spare, max(costs) + spare
        top = max(line.interval[1] for line in lines)
        self.step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if top / step <= 6)
        self.top = min(1.0, math.ceil(top / self.step + 1e-9) * self.step) or self.step

    def x(self, cost: float | None) -> float:
        """Position of a cost."""
        share = (math.log(cost or 1) - self.low) / (self.high - self.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, accuracy: float) -> float:
        """Position of an accuracy."""
        return _HEIGHT - _BOTTOM - min(1.0, max(0.0, accuracy / self.top)) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        """Lines and numbers of both axes."""
        out = []
        for i in range(round(self.top / self.step) + 1):
            y = self.y(i * self.step)
            out.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{100 * i * self.step:g}%</text>'
            )
        for value in _ticks(math.exp(self.low), math.exp(self.high)):
            out.append(
                f'<text class="tick" x="{self.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">'
                f"{value:g}</text>"
            )
        return out


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two bounds where the usual steps give them, at least one otherwise."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [1 + i / 4 for i in range(36)]):
        found = [v for e in powers for step in steps if low <= (v := float(f"{step * 10.0**e:.12g}")) <= high]
        if len(found) >= 3:
            break
    return found if len(found) <= 7 else found[:: -(-len(found) // 7)]


def _series(lines: Sequence[RunFigures], cost: str) -> dict[tuple[str, str], list[RunFigures]]:
    out: dict[tuple[str, str], list[RunFigures]] = {}
    for line in lines:
        out.setdefault((line.model, line.method), []).append(line)
    return {key: sorted(members, key=lambda line: line.cost(cost) or 0) for key, members in out.items()}


def write_png(task: TaskFigures, methods: Sequence[str], path: Path) -> None:
    """The charts of a task side by side as one PNG, for pages that take no SVG.

    Args:
        task: the figures.
        methods: all of the report, for the colours.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    costs = [cost for cost in COSTS if any((line.cost(cost) or 0) > 0 for line in task.runs)]
    figure = Figure(figsize=(4.8 * len(costs), 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        shown = [line for line in task.runs if (line.cost(cost) or 0) > 0]
        for (model, method), members in _series(shown, cost).items():
            colour = colour_of(method, methods)[0]
            x, y = [line.cost(cost) for line in members], [line.accuracy for line in members]
            spread = [[v - line.interval[0] for v, line in zip(y, members, strict=True)]]
            spread.append([line.interval[1] - v for v, line in zip(y, members, strict=True)])
            axes.errorbar(x, y, yerr=[[max(0, v) for v in side] for side in spread], color=colour, elinewidth=1)
            axes.plot(x, y, "o", color=colour, label=method if model == shown[0].model else f"{method}, {model}")
            ringed = [i for i, line in enumerate(members) if line.label in task.fronts[cost]]
            axes.plot([x[i] for i in ringed], [y[i] for i in ringed], "o", ms=12, mfc="none", mec=colour)
        axes.set(xscale="log", xlabel=COSTS[cost], ylim=(0, None))
        held = _Axes(shown, cost)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(math.exp(held.low), math.exp(held.high))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(color="#dddee2", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(task.name)
    figure.savefig(path, metadata={"Software": None})


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
    """One failure.

    Args:
        kind: a key of `KINDS`.
        row: the question and what was answered.
        jpeg: the page with what was read (orange) and the known places (green), the region enlarged below it, as
            base64; empty without the picture.
    """

    kind: str
    row: AnswerRow
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


def pick_run(group: TaskRuns) -> Run | None:
    """The run whose failures are shown: the most accurate of the model's own zooming ones, else of all."""
    own = [run for run in group.runs if run.method in ("qzoom", "always")] or list(group.runs)
    return max(own, key=lambda run: sum(map(row_score, run.rows)), default=None)


def failures(group: TaskRuns, run: Run, each: int, data: Path | None = None) -> list[Card]:
    """Some failures of every kind, from different pictures, spread evenly over the run.

    Args:
        group: the task's runs.
        run: one of them.
        each: most cards of a kind.
        data: folder of the task's pictures, where it has one.
    """
    wrong: dict[str, dict[str, AnswerRow]] = {kind: {} for kind in KINDS}
    for row in run.rows:
        if row_score(row) == 0:
            wrong[failure_kind(row)].setdefault(row.picture, row)
    pictures = _Pictures(group, data)
    cards = []
    for kind, rows in wrong.items():
        found = list(rows.values())
        chosen = [found[i * len(found) // each] for i in range(each)] if len(found) > each else found
        cards += [Card(kind, row, _drawn(pictures.of(row.picture), row)) for row in chosen]
    return cards


class _Pictures:
    """The pictures of a task by id.

    Args:
        group: for what decides the questions.
        data: folder, where the task has one.
    """

    def __init__(self, group: TaskRuns, data: Path | None) -> None:
        self._questions = group.questions
        self._data = data
        self._files = self._read_files()

    def of(self, name: str) -> PIL.Image.Image | None:
        """The picture, or None where it cannot be had."""
        from qzoom.data.drawn import SYNTHETIC_TASKS, SyntheticTask
        from qzoom.images.load import load_image

        kind, _, number = name.rpartition("-")
        if self._questions.get("task") in SYNTHETIC_TASKS and kind == self._questions["task"] and number.isdigit():
            source = SyntheticTask(kind, int(number), 1).sample(0).image
        elif name in self._files:
            source = self._files[name]
        else:
            return None
        try:
            return load_image(source).image
        except QZoomError:
            return None

    def _read_files(self) -> dict[str, Path]:
        """Pictures of a question file, if it is the one that was asked."""
        from qzoom.data.questions import read_receipts

        if self._data is None or "split" not in self._questions or "sha256" not in self._questions:
            return {}
        try:
            task = read_receipts(self._data, str(self._questions["split"]))
        except QZoomError:
            return {}
        same = task.sha256 == self._questions["sha256"]
        return {s.id: s.image for s in task.samples if isinstance(s.image, Path)} if same else {}


def _drawn(picture: PIL.Image.Image | None, row: AnswerRow) -> str:
    """Page and enlarged region as a base64 JPEG."""
    if picture is None:
        return ""
    from PIL import Image, ImageDraw

    from qzoom.images.geometry import scale_box
    from qzoom.plots.overlay import draw_boxes

    page = _within(picture.convert("RGB"), _PAGE_PX)
    draw = ImageDraw.Draw(page)
    for place in row.boxes:
        x0, y0, x1, y1 = scale_box(place, picture.size, page.size)
        draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=_PLACE, width=2)
    page, _ = draw_boxes(page, [region.box for region in row.regions], picture.size, numbered=len(row.regions) > 1)
    if row.regions:
        crop = _within(picture.convert("RGB").crop(row.regions[0].box), _CROP_PX, grow=True)
        whole = Image.new("RGB", (max(page.width, crop.width), page.height + 8 + crop.height), (255, 255, 255))
        whole.paste(page, ((whole.width - page.width) // 2, 0))
        whole.paste(crop, ((whole.width - crop.width) // 2, page.height + 8))
        page = whole
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _within(image: PIL.Image.Image, room: Sequence[int], *, grow: bool = False) -> PIL.Image.Image:
    """The picture scaled to fit; small ones stay as they are unless they may grow (by 4 at most)."""
    scale = min(room[0] / image.width, room[1] / image.height, 4 if grow else 1)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


_STYLE = """
:root{color-scheme:light dark;--paper:#f7f7f5;--card:#fff;--ink:#181c24;--muted:#626976;--line:#dee0e4;--accent:#de5426}
@media (prefers-color-scheme:dark){:root{--paper:#14161b;--card:#1d2027;--ink:#eceef2;--muted:#9aa2b1;--line:#343943;
--accent:#ff8a5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:48px 24px 80px}
h1{font-size:2.1rem;line-height:1.2;margin:0 0 .4em}h2{margin:2.4em 0 .3em;font-size:1.5rem}h3{margin:1.8em 0 .6em}
p,li{max-width:76ch}.muted{color:var(--muted);font-size:.9rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:20px}
.grid{display:grid;gap:20px;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));margin:20px 0}
.gallery{grid-template-columns:repeat(auto-fill,minmax(270px,1fr))}
.big{font-size:2rem;font-weight:650;line-height:1.1}.chart{width:100%;height:auto;display:block}
.chart text{fill:var(--muted);font-size:15px}.chart .axis{fill:var(--ink)}.rule{stroke:var(--line)}
.line{fill:none;stroke-width:2}.whisker{stroke-width:1.2;opacity:.65}.ring{fill:none;stroke-width:1.6}
.dot{stroke:var(--card);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;padding:0;margin:8px 0;list-style:none;font-size:.9rem}
.legend i{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:7px;background:currentColor}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--muted);font-weight:550}
figure{margin:0}figure img{width:100%;height:auto;border-radius:8px;background:#fff}
figcaption{margin-top:10px;font-size:.9rem;overflow-wrap:anywhere}figcaption b{font-weight:600}
.wrong{color:var(--accent)}nav a{margin-right:16px;color:var(--accent)}
"""


def render_page(title: str, tasks: Sequence[TaskFigures], ran: str, galleries: Sequence[tuple[str, list[Card]]]) -> str:
    """The whole page.

    Args:
        title: of the page.
        tasks: the figures.
        ran: what ran, in words.
        galleries: for each task the run whose failures are shown, and their cards.
    """
    methods = sorted({line.method for task in tasks for line in task.runs})
    name = html.escape(title)
    links = "".join(f'<a href="#task-{i}">{html.escape(task.name)}</a>' for i, task in enumerate(tasks, start=1))
    body = [
        f"<h1>{name}</h1><p>{_code(NOTE)}</p><p class=muted>Ran with {html.escape(ran)}.</p><nav>{links}</nav>",
    ]
    for number, (task, (run, cards)) in enumerate(zip(tasks, galleries, strict=True), start=1):
        body.append(_task(number, task, methods, run, cards))
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}{_colours(methods)}</style></head>"
    )
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


def _task(number: int, task: TaskFigures, methods: Sequence[str], run: str, cards: Sequence[Card]) -> str:
    used = [method for method in methods if any(line.method == method for line in task.runs)]
    legend = "".join(f'<li><i class="c-{m}"></i>{html.escape(m)}</li>' for m in used)
    charts = [svg_chart(task, cost, methods) for cost in COSTS]
    drawn = "".join(f'<div class="card">{chart}</div>' for chart in charts if chart)
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in findings(task))
    return (
        f'<section id="task-{number}"><h2>{html.escape(task.name.capitalize())}</h2>'
        f"<p class=muted>{task.questions} questions about {task.pictures} pictures</p>{_headline(task)}"
        f'<ul class="legend">{legend}<li class=muted>ring: on the front; whisker: 95 %</li></ul>'
        f'<div class="grid">{drawn}</div><ul>{said}</ul>{_table(task)}{_gallery(run, cards)}</section>'
    )


def _headline(task: TaskFigures) -> str:
    """The savings at equal accuracy and the gain over the best plain run, as large numbers."""
    found = []
    equal = task.equal_accuracy
    if equal is not None:
        found.append((times(equal["throughput"]).replace(" times", "×"), "throughput at the best plain run's accuracy"))
        found.append((f"−{percent(equal['tokens_saved'])} %", "visual tokens at the best plain run's accuracy"))
    zooming = [line for line in task.runs if line.method in ("qzoom", "always") and line.difference is not None]
    if zooming:
        best = max(zooming, key=lambda line: line.accuracy)
        found.append((f"{100 * (best.difference or 0):+.1f}", "points: best zooming run against best plain run"))
    boxes = (
        f'<div class="card"><div class="big">{big}</div><div class=muted>{small}</div></div>' for big, small in found
    )
    return f'<div class="grid">{"".join(boxes)}</div>' if found else ""


def _table(task: TaskFigures) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(line)) + "</tr>" for line in task.runs
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _gallery(run: str, cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    parts = [f"<h3>Failures of “{html.escape(run)}”</h3>"]
    parts.append("<p class=muted>Orange: what was read, enlarged below the page. Green: where the answer stands.</p>")
    for kind, words in KINDS.items():
        own = [card for card in cards if card.kind == kind]
        if own:
            parts.append(f'<p><b>{words}</b></p><div class="grid gallery">{"".join(map(_card, own))}</div>')
    return "".join(parts)


def _card(card: Card) -> str:
    row = card.row
    said = row.error or row.prediction or "(nothing)"
    picture = (
        f'<img alt="{html.escape(row.picture, quote=True)}" src="data:image/jpeg;base64,{card.jpeg}">'
        if card.jpeg
        else f"<p class=muted>The picture {html.escape(row.picture)} is not at hand.</p>"
    )
    return (
        f'<figure class="card">{picture}<figcaption>{html.escape(row.question)}<br>'
        f'<b class="wrong">{html.escape(said)}</b> instead of <b>{html.escape(row.answer)}</b></figcaption></figure>'
    )


def _colours(methods: Sequence[str]) -> str:
    """Stroke and fill of every method, on light and on dark paper."""
    out = []
    for shade, frame in ((0, "{}"), (1, "@media (prefers-color-scheme:dark){{{}}}")):
        rules = []
        for method in methods:
            colour = colour_of(method, methods)[shade]
            rules.append(f".m-{method}{{stroke:{colour}}}.dot.m-{method}{{fill:{colour}}}.c-{method}{{color:{colour}}}")
        out.append(frame.format("".join(rules)))
    return "".join(out)


def _code(text: str) -> str:
    """Text with `words` as code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


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
