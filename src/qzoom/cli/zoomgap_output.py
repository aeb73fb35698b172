"""The figures of `qzoom eval zoomgap` as lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qzoom.evaluation.zoomgap import GapFigures

__all__ = ["comparison_lines", "lines"]


def lines(found: GapFigures) -> list[str]:
    """A table of the views, the gap, and tables per kind and area."""
    out = [f"{found.n} questions with a place, {found.pictures} pictures", ""]
    out.append(f"{'view':<10}{'accuracy':>10}{'95 % interval':>20}{'tokens':>9}{'failed':>8}")
    for view, accuracy in found.accuracy.items():
        tokens = found.visual_tokens[view]
        out.append(
            f"{view:<10}{_share(accuracy):>10}{_between(found.intervals[view]):>20}"
            f"{'-' if tokens is None else f'{tokens:.1f}':>9}{found.errors[view]:>8}"
        )
    out.append("")
    if found.gap is not None:
        out.append(f"gap (region - full)     {_points(found.gap)}  {_points_between(found.gap_interval)}")
    if found.zoom_gain is not None:
        out.append(f"zoom - full             {_points(found.zoom_gain[0])}  {_points_between(found.zoom_gain[1])}")
    if found.negatives["n"]:
        said = ", ".join(f"{name} {_share(value)}" for name, value in found.negatives.items() if name != "n")
        out.append(f"negatives               {found.negatives['n']} questions, right: {said}")
    if found.yes_no["n"]:
        said = ", ".join(f"{name} {_share(value)}" for name, value in found.yes_no["said_yes"].items())
        out.append(f"said yes                {said} of {found.yes_no['n']}; true: {_share(found.yes_no['truly_yes'])}")
    if found.dropped:
        out.append(f"left out                {found.dropped} pictures that not every view has answered")
    return out + _table("kind", found.per_kind) + _table("area", found.per_area)


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """This run beside another one."""
    out = ["", f"{'':<12}{'this':>8}{'other':>8}{'difference':>12}  95 % interval"]
    for name, pair in found.items():
        if not isinstance(pair, dict):
            continue
        out.append(
            f"{name:<12}{_share(pair['this']):>8}{_share(pair['other']):>8}{_points(pair['difference']):>12}  "
            f"{_points_between(pair['interval'])}"
        )
    gap = found.get("gap")
    if gap is not None and gap["closed"] is not None:
        out.append(f"{gap['closed']:.0%} of the other's gap is gone")
    return out


def _table(title: str, groups: dict[str, dict[str, Any]]) -> list[str]:
    if not groups:
        return []
    names = list(dict.fromkeys(name for group in groups.values() for name in group if name != "gap_interval"))
    width = 2 + max(len(title), *map(len, groups))
    out = ["", f"{title:<{width}}" + "".join(f"{name:>9}" for name in names)]
    for name, group in groups.items():
        cells = (group.get(key) for key in names)
        shown = (f"{_cell(key, value):>9}" for key, value in zip(names, cells, strict=True))
        out.append(f"{name:<{width}}" + "".join(shown))
    return out


def _cell(name: str, value: Any) -> str:
    if name == "n":
        return str(value)
    return _points(value) if name == "gap" else _share(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def _between(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.1%} to {ends[1]:.1%}"


def _points_between(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})"
