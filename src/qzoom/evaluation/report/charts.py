"""Accuracy against a cost as a drawing: SVG for the page (it follows the page's colours), the same as PNG.

Every method is a line through its budgets; whiskers are 95 % intervals; runs on the front carry a ring.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from qzoom.evaluation.report.figures import COSTS, RunFigures, TaskFigures

__all__ = ["COLOURS", "colour_of", "svg_chart", "write_png"]

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
