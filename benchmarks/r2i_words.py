"""The texts of `benchmarks.r2i`: what training from crops changed, as one Markdown page."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from qzoom.evaluation.tables import interval, markdown_table, percent, write_figures

NOTE = (
    "Base and student answer the same held-out questions under the same limits of visual tokens. Region: the crop "
    "alone, as teachers saw it. Boxed, where asked: the whole picture with the region marked. Accuracy is the share "
    "of exact matches, in per cent; intervals hold in 95 % of cases, by pairs, pictures drawn with replacement. "
    "Negatives ask for what is not there. Lift is the share of the question's attention inside the answer's place "
    "over the place's share of the picture (chance is 1), at the layer or head that each model's other pictures "
    "chose; its questions are those about the pictures that did not choose. A student zooms with the base's gate and "
    "region branch unless they were fitted to it again."
)
VIEWS = {"full": "whole picture", "region": "region", "boxed": "boxed", "zoom": "zooming"}


def gap_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The four views, the gap and the negatives at the main cap; the first row is the head."""
    difference = found["difference"]
    rows = [["", "questions", "base", "student", "difference", "95 %"]]
    for name, title in [*VIEWS.items(), ("gap", "gap (region less whole)"), ("negatives", "negatives, whole picture")]:
        pair = difference.get(name)
        if pair is not None:
            rows.append([title, str(pair["n"]), percent(pair["other"]), percent(pair["this"]), *_change(pair)])
    return rows


def budget_rows(caps: Mapping[int, Any]) -> list[list[str]]:
    """Base, R2I, zoom, and both at equal token budgets."""
    rows = [["most visual tokens", "base", "R2I", "zoom", "R2I + zoom", "R2I less base, 95 %", "R2I + zoom less zoom"]]
    for cap, found in sorted(caps.items()):
        full, zoom = found["difference"]["full"], found["difference"]["zoom"]
        figures = [percent(pair[side]) for pair in (full, zoom) for side in ("other", "this")]
        rows.append([str(cap), *figures, interval(full["interval"]), interval(zoom["interval"])])
    return rows


def attention_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Lift and pointing before and after."""
    rows, count = [["attention", "questions", "base", "student", "difference", "95 %"]], str(found["n"])
    for which in ("layer", "head"):
        lift, hit = found[f"{which}_lift"], found[f"{which}_hit"]
        low, high = lift["interval"]
        figures = [f"{lift['other']:.2f}", f"{lift['this']:.2f}", f"{lift['difference']:+.2f}"]
        rows.append([f"lift, {which}", count, *figures, f"{low:+.2f} to {high:+.2f}"])
        rows.append([f"pointing, {which}", count, percent(hit["other"]), percent(hit["this"]), *_change(hit)])
    return rows


def kind_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Per field: whole picture and region, before and after."""
    rows = [["field", "questions", "whole: base", "student", "region: base", "student"]]
    base, student = found["base"]["per_kind"], found["student"]["per_kind"]
    for name, before in base.items():
        after = student.get(name)
        if after is not None:
            pairs = [percent(side[view]) for view in ("full", "region") for side in (before, after)]
            rows.append([name, str(before["n"]), *pairs])
    return rows


def _change(pair: Mapping[str, Any]) -> list[str]:
    return [percent(pair["difference"], sign=True), interval(pair["interval"])]


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence on the gap."""
    gap = found["difference"].get("gap")
    if gap is None or gap["closed"] is None:
        return ""
    low, high = gap["interval"]
    sure = "excludes" if high < 0 or low > 0 else "does not exclude"
    return (
        f"The gap went from {percent(gap['other'])} to {percent(gap['this'])} points: {percent(gap['closed'])} % of it "
        f"is closed (a third was the goal); the interval of the change {sure} zero.\n"
    )


def data_words(data: Mapping[str, Any]) -> list[str]:
    """What the student learned from; nothing without a report."""
    if not data:
        return []
    steps, rows = data["steps"], data["rows"]
    out = [
        f"The student learned from {data['pictures']:,} pictures: {steps['answer']['entered']:,} questions about crops "
        f"were answered, {steps['vote']['kept']:,} answers agreed on, {sum(rows.values()):,} rows exported, "
        f"{data['negatives']:,} of them about absent things.\n"
    ]
    if data.get("known"):
        lines = [["agreed answers", "compared with known ones", "right"]]
        lines += [[kind, str(n["agreed"]), percent(n["right"] / n["agreed"])] for kind, n in data["known"].items()]
        out.append(markdown_table(lines))
    return out


def page(given: Namespace, ran: Mapping[str, Any], data: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """The whole page."""
    out = ["## Region-to-Image distillation\n", f"{NOTE}\n"]
    out.append(
        f"Base `{ran['base']['model']}` (weights `{ran['base']['weights']}`), student weights "
        f"`{ran['student']['weights']}`, {ran['base']['dtype']}, {ran['base']['device']}; zooming: {given.zoom}. "
        "Made by `python -m benchmarks.r2i`.\n"
    )
    out += data_words(data)
    if given.limit is not None:
        out.append(f"**A trial with at most {given.limit} pictures of each kind: no evidence.**\n")
    for name, found in kinds.items():
        out.append(f"### {name.capitalize()}: before and after\n")
        main = found["caps"].get(given.cap)
        if main is not None:
            out += [
                f"At most {given.cap} visual tokens in every view.\n",
                markdown_table(gap_rows(main)),
                verdict(main),
            ]
        if found["caps"]:
            out.append(markdown_table(budget_rows(found["caps"])))
        if "attention" in found:
            out.append(markdown_table(attention_rows(found["attention"])))
        if main is not None:
            out.append(markdown_table(kind_rows(main)))
    return "\n".join(out).rstrip() + "\n"


def write_r2i(given: Namespace, ran: Mapping[str, Any], data: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Write docs/results/r2i.md and .json."""
    figures = {"about": ran, "zoom": given.zoom, "limit": given.limit, "data": data, "kinds": kinds}
    write_figures(given.results, "r2i", figures, page(given, ran, data, kinds))
