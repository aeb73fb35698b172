"""Figures as text, tables, files and charts, for the commands, the report and the benchmarks.

Shares are between 0 and 1 and are printed in per cent; None is printed as a dash.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.plots.text import ACCENTS, COARSE, HAIRLINE, INK, MUTED, Colour
from qzoom.store.log import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from qzoom.evaluation.calibrate import Calibration
    from qzoom.evaluation.coverage import Coverage
    from qzoom.evaluation.score import Scores

_NONE = "–"


def percent(value: float | None, *, sign: bool = False, unit: str = "") -> str:
    """A share in per cent with one decimal. `sign`: print + before positive numbers. `unit`: printed behind the number,
    such as "%"."""
    return _NONE if value is None else f"{100 * value:{'+' if sign else ''}.1f}{unit}"


def interval(ends: Sequence[float] | None, *, sign: bool = True, unit: str = "") -> str:
    """Both ends of an interval of shares; arguments as in `percent`."""
    return _NONE if ends is None else " to ".join(percent(end, sign=sign, unit=unit) for end in ends)


def times(value: float | None) -> str:
    """A ratio."""
    return _NONE if value is None else f"{value:.2f} times"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, the first column is aligned to the left."""
    ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in ruled) + "\n"


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The same for terminals, a line each."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def score_lines(scores: Scores) -> list[str]:
    """The figures of `qzoom eval`."""
    lines = [
        f"questions      {scores.n}" + (f" ({scores.errors} failed)" if scores.errors else ""),
        f"exact match    {_per_field(scores.exact_match)}",
        f"ANLS           {percent(scores.anls, unit='%')}",
        f"zoomed         {percent(scores.zoomed, unit='%')}",
    ]
    if scores.metric != "exact_match":
        lines[1:3] = [
            f"{scores.metric:<15}{_per_field(scores.strict)}",
            f"as lmms-eval   {percent(scores.harness['all'], unit='%')}",
        ]
    if scores.unread:
        lines.insert(3, f"unread         {scores.unread} answers name no option clearly and count as wrong")
    groups = [(name, "exact match", group["exact_match"], group) for name, group in scores.difficulty.items()]
    if scores.metric != "exact_match":
        metric = scores.metric.replace("_", " ")
        groups += [(f"area {name}", metric, group["strict"], group) for name, group in scores.areas.items()]
    for name, metric, value, group in groups:
        lines.append(
            f"{name:<15}{group['n']} questions, {metric} {percent(value, unit='%')}, "
            f"zoomed {percent(group['zoomed'], unit='%')}"
        )
    if scores.zoomed:
        hit, area = percent(scores.hit_rate, unit="%"), percent(scores.box_area, unit="%")
        lines.append(f"regions        hit {hit}, area {area} of the picture")
    if scores.visual_tokens is not None and scores.seconds is not None:
        lines.append(f"cost           {scores.visual_tokens:.1f} visual tokens, {scores.seconds:.3f} s per question")
    return lines


def _per_field(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {percent(value, unit='%')}" for name, value in values.items())


def gap_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures of `qzoom eval zoomgap`: a table of the views, the gap, tables per kind and size."""
    rows = [["view", "accuracy", "95 % interval", "tokens", "failed"]]
    for view, tokens in figures["visual_tokens"].items():
        ends = interval(figures["intervals"][view], sign=False, unit="%")
        shown = _NONE if tokens is None else f"{tokens:.1f}"
        rows.append([view, percent(figures[view], unit="%"), ends, shown, str(figures["errors"][view])])
    out = [f"{figures['n']} questions with a place, {figures['pictures']} pictures", "", *text_table(rows), ""]
    if figures["gap"] is not None:
        out.append(f"gap (region - full)     {_points(figures['gap'], figures['gap_interval'])}")
    if figures["zoom_gain"] is not None:
        out.append(f"zoom - full             {_points(figures['zoom_gain'], figures['zoom_gain_interval'])}")
    negatives, yes_no = figures["negatives"], figures["yes_no"]
    if negatives["n"]:
        right = _per_field({name: value for name, value in negatives.items() if name != "n"})
        out.append(f"negatives               {negatives['n']} questions, right: {right}")
    if yes_no["n"]:
        truth = percent(yes_no["truly_yes"], unit="%")
        out.append(f"said yes                {_per_field(yes_no['said_yes'])} of {yes_no['n']}; true: {truth}")
    if figures["dropped"]:
        out.append(f"left out                {figures['dropped']} pictures that not every view has answered")
    for title, groups in (("kind", figures["per_kind"]), ("area", figures["per_area"])):
        if groups:
            names = list(dict.fromkeys(n for group in groups.values() for n in group if n != "gap_interval"))
            cells = [[kind, *(_cell(n, group.get(n)) for n in names)] for kind, group in groups.items()]
            out += ["", *text_table([[title, *names], *cells])]
    return out


def _cell(name: str, value: Any) -> str:
    if name == "n":
        return str(value)
    return percent(value, sign=True) if name == "gap" else percent(value, unit="%")


def _points(value: float | None, ends: Sequence[float] | None) -> str:
    return percent(value, sign=True) + ("" if ends is None else f"  ({interval(ends)})")


def gap_comparison_lines(figures: Mapping[str, Any]) -> list[str]:
    """What `compare_gaps` found: this run beside another one."""
    rows = [["", "this", "other", "difference", "95 % interval"]]
    for name, pair in figures.items():
        if isinstance(pair, dict):
            both = [percent(pair[side], unit="%") for side in ("this", "other")]
            rows.append([name, *both, percent(pair["difference"], sign=True), interval(pair["interval"])])
    out = ["", *text_table(rows), *_dropped(figures)]
    gap = figures.get("gap")
    if gap is not None and gap["closed"] is not None:
        out.append(f"{gap['closed']:.0%} of the other's gap is gone")
    return out


def coverage_lines(figures: Coverage, difference: Mapping[str, Any] | None = None) -> list[str]:
    """The figures of `qzoom eval coverage`, and the differences that `compare_coverage` found."""
    rows = [["", "chosen", "lift", "95 % interval", "pointing"]]
    for name, measure in figures.measures.items():
        for selected in (measure["layer"], measure["head"]):
            head = "" if selected["head"] is None else f", head {selected['head']}"
            ends = " to ".join(f"{end:.2f}" for end in selected["lift_interval"])
            hit = percent(selected["hit"], unit="%")
            rows.append([name, f"layer {selected['layer']}{head}", f"{selected['lift']:.2f}", ends, hit])
    rows.append(["chance", "", "1.00", "", percent(figures.chance_hit, unit="%")])
    out = [
        f"{figures.n} questions with a place, {figures.pictures} pictures; "
        f"a place covers {figures.area:.2%} on average",
        f"figures of {figures.reported} questions whose pictures did not choose the layer or head",
        "",
        *text_table(rows),
    ]
    for name, pair in (difference or {}).items():
        if isinstance(pair, dict):
            low, high = pair["interval"]
            out.append(
                f"{name.replace('_', ' '):<12}{pair['this']:.3f}, other {pair['other']:.3f}, difference "
                f"{pair['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
            )
    return [*out, *_dropped(difference or {})]


def _dropped(figures: Mapping[str, Any]) -> list[str]:
    """What a comparison says about questions that only one run has."""
    count = figures.get("dropped", 0)
    return [f"{count} questions that only one of the runs has are left out of the comparison"] if count else []


def calibration_lines(calibration: Calibration) -> list[str]:
    """The figures of `qzoom calibrate`."""
    point, goal = calibration.point, calibration.provenance["wish"]
    low, high = point.interval
    failed = f", {calibration.failed} left out" if calibration.failed else ""
    lines = [
        f"questions         {calibration.asked}{failed}",
        f"gate threshold    {calibration.gate_threshold:.6g}",
        f"region threshold  {calibration.region_threshold:.6g}",
        f"zoomed            {percent(point.share_zoomed, unit='%')}",
        f"latency           {point.latency_ms:.1f} ms per question",
        f"loss              {percent(point.loss, unit='%')} "
        + ("of the answers" if calibration.always is not None else "other answers"),
    ]
    for name, gate in calibration.provenance.get("confidence_gates", {}).items():
        lines.append(f"{name:<17} {gate['threshold']:.6g} zooms {percent(gate['share_zoomed'], unit='%')}")
    if "max_accuracy_loss" in goal:
        return [*lines, f"bound             at most {high:.2%} lost"]
    what = "share zoomed" if "share_zoomed" in goal else "latency, ms"
    return [*lines, f"interval          {low:.4g} to {high:.4g} ({what})"]


def write_figures(folder: Path, name: str, figures: Any, markdown: str) -> None:
    """Write NAME.json and NAME.md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{name}.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(folder / f"{name}.md", markdown)


def new_figure(panels: int, *, width: float = 4.8, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, each with a grid and without a frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panel_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in panel_axes:
        axes.grid(color=_rgb(HAIRLINE), linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_rgb(MUTED))
    return figure, panel_axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure; the same figure gives the same bytes. The file's ending chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None} if path.suffix.lower() == ".png" else None)
    return path


def log_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two bounds where the usual steps give them, at least one otherwise."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [1 + i / 4 for i in range(36)]):
        ticks = [v for e in powers for step in steps if low <= (v := float(f"{step * 10.0**e:.12g}")) <= high]
        if len(ticks) >= 3:
            break
    return ticks if len(ticks) <= 7 else ticks[:: -(-len(ticks) // 7)]


def plot_coverage(coverage: Coverage, path: Path, *, title: str = "") -> Path:
    """Draw lift and pointing over the depth of the model. Returns the path written."""
    figure, (lifts, hits) = new_figure(2)
    for name, colour in (("relative", _rgb(ACCENTS[0])), ("raw", _rgb(COARSE))):
        curves = coverage.measures[name]
        lifts.plot(coverage.depths, curves["lift"], "o-", ms=3, color=colour, label=f"{name}, mean of heads")
        lifts.plot(coverage.depths, curves["best_lift"], ":", color=colour, label=f"{name}, best head")
        hits.plot(coverage.depths, curves["hit"], "o-", ms=3, color=colour, label=name)
        selected = curves["layer"]
        for axes, value in ((lifts, selected["lift"]), (hits, selected["hit"])):
            axes.plot([selected["depth"]], [value], "o", ms=10, mfc="none", mec=colour)
    lifts.axhline(1, color=_rgb(MUTED), lw=1, ls="--")
    hits.axhline(coverage.chance_hit, color=_rgb(MUTED), lw=1, ls="--", label="chance")
    lifts.set_ylabel("lift: share of attention / share of area", color=_rgb(INK))
    hits.set_ylabel("highest cell on the place", color=_rgb(INK))
    hits.set_ylim(0, None)
    for axes in (lifts, hits):
        axes.set_xlabel("depth: share of the layers", color=_rgb(INK))
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(
        title or f"{coverage.n} questions about {coverage.pictures} pictures; rings: chosen layer, other half"
    )
    return save_figure(figure, path)


def _rgb(colour: Colour) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255
