"""The ablations as figures and tables: differences with intervals, beside the paper's rows, and what was reproduced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ablation_labels import label_facts
from benchmarks.ablation_variants import GROUPS, REFERENCE, VARIANTS
from benchmarks.choices import is_right, paired, skip_at
from qzoom.evaluation.tables import interval, markdown_table, percent, write_figures

if TYPE_CHECKING:
    from benchmarks.ablation_train import Bench
    from qzoom.data.samples import AnswerRow

NOTE = (
    "The embedded model's base with new branches, trained for each variant on labels of drawn pictures, far fewer than "
    "the paper's; every question is zoomed. `difference`: accuracy less that of the reference on the same questions, "
    "in points, with its 95 % interval over pictures. `hit`: share of zooms whose region holds a known place of the "
    "answer. `area`: mean share of the picture that regions cover. The region threshold of each variant was chosen on "
    "other pictures. One training each, so differences between seeds are not in the intervals."
)
GATE_PAPER = "7B: at 85.5 % accuracy the consistent labels skip 16.5 % more queries than the naive ones"


def write_ablations(bench: Bench, variants: Mapping[str, Any], gates: Mapping[str, Any], ran: dict[str, Any]) -> None:
    """Write ablations.json and ablations.md from what is finished."""
    figures: dict[str, Any] = {"about": ran, "limit": bench.given.limit, "variants": {}, "gates": {}}
    notes = [bench.root / "variants" / variant.name / "note.txt" for variant in VARIANTS]
    figures["notes"] = [f"{note.parent.name}: {note.read_text(encoding='utf-8')}" for note in notes if note.is_file()]
    reference = variants.get(REFERENCE)
    for name, found in variants.items():
        figures["variants"][name] = _figures(bench, found, reference)
    for strategy, found in gates.items():
        figures["gates"][strategy] = _gate_figures(bench, strategy, found)
    write_figures(bench.given.results, "ablations", figures, markdown(figures, [c + r for c, r in bench.given.looks]))


def _figures(bench: Bench, found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    variant = found["variant"]
    out: dict[str, Any] = {"title": variant.title, "group": variant.group, "threshold": found["threshold"], "caps": {}}
    out["checks"] = variant.checks
    labels = bench.root / "labels" / variant.labels
    report = bench.root / "variants" / variant.name / "train" / "report.json"
    if variant.trains and (labels / "records-00.jsonl").is_file():
        out["labels"] = label_facts(labels)
    if report.is_file():
        out["training"] = _training(report)
    for look, rows in found["rows"].items():
        one = summary(rows)
        if reference is not None and variant.name != REFERENCE:
            one["against"] = paired(rows, reference["rows"][look])
        out["caps"][str(sum(look))] = one
    return out


def _training(report: Path) -> dict[str, Any]:
    """What a training came to, without the place of its model."""
    return {name: value for name, value in json.loads(report.read_text(encoding="utf-8")).items() if name != "model"}


def summary(rows: Sequence[AnswerRow]) -> dict[str, Any]:
    """Accuracy, hits, area and tokens of a run."""
    from qzoom.evaluation.score import score

    found = score(rows)
    return {
        "n": found.n,
        "accuracy": found.strict["all"],
        "hit": found.hit_rate,
        "area": found.box_area,
        "tokens": found.visual_tokens,
        "errors": found.errors,
    }


def _gate_figures(bench: Bench, strategy: str, found: Mapping[str, Any]) -> dict[str, Any]:
    if "note" in found:
        return dict(found)
    out: dict[str, Any] = {"caps": {}}
    report = bench.root / "variants" / f"gate-{strategy}" / "train" / "report.json"
    if report.is_file():
        out["training"] = _training(report)
    for look, (plain, zoomed) in found["rows"].items():
        out["caps"][str(sum(look))] = skips(plain, zoomed)
    return out


def skips(plain: Sequence[AnswerRow], zoomed: Sequence[AnswerRow]) -> dict[str, Any]:
    """How many questions a gate may answer from the coarse pass at no loss and at the loss of a point."""
    scored = [
        (row.gate.score, is_right(coarse), is_right(row))
        for coarse, row in zip(plain, zoomed, strict=True)
        if row.gate is not None and row.gate.score is not None
    ]
    always = sum(right for _, _, right in scored) / len(scored) if scored else 0.0
    return {
        "n": len(scored),
        "always": always,
        "never": sum(right for _, right, _ in scored) / len(scored) if scored else 0.0,
        "skip_no_loss": skip_at(scored, always),
        "skip_one_point": skip_at(scored, always - 0.01),
    }


def verdict(better: str, intervals: Sequence[Sequence[float]]) -> str:
    """What the differences of a variant (variant less reference) say about the paper's claim.

    Args:
        better: "higher" or "lower", how the reference stands to the variant in the paper; "" when it does not say.
        intervals: one per cap.
    """
    if not better:
        return "no claim to check"
    up, down = (sum(side) for side in zip(*((low > 0, high < 0) for low, high in intervals), strict=True))
    if up and down:
        return "mixed"
    if better == "lower":
        up, down = down, up
    return "reproduced" if down else "the opposite" if up else "not told apart"


def markdown(figures: Mapping[str, Any], caps: Sequence[int]) -> str:
    """Everything that is finished as Markdown."""
    ran, variants = figures["about"], figures["variants"]
    parts = ["## Ablations\n", f"{NOTE}\n"]
    which = f"`{ran['model']}` (weights `{ran['weights']}`)"
    parts.append(f"Base of {which}, {ran['device']}. Made by `python -m benchmarks.ablations`.\n")
    if figures["limit"] is not None:
        parts.append(f"**A trial with at most {figures['limit']} pictures of each kind: no evidence.**\n")
    if REFERENCE not in variants:
        return "\n".join([*parts, "Nothing is finished yet."]) + "\n"
    asked = {found["n"] for found in variants[REFERENCE]["caps"].values()}
    parts.append(f"{' and '.join(map(str, sorted(asked)))} questions at each cap.\n")
    facts = variants[REFERENCE].get("labels", {})
    if facts:
        parts.append(
            f"Labels: {facts['maps']} maps, {facts['usable']} usable, {percent(facts['agreement'])} % of those with a "
            f"known place have foreground on it; {percent(facts.get('sinks'))} % of the cells are sinks.\n"
        )
    verdicts = [["Question", "by the paper", "here"]]
    for key, group in GROUPS.items():
        members = {name: one for name, one in variants.items() if one["group"] == key}
        if not members:
            continue
        parts += [f"### {group.title}\n", f"Paper: {group.paper}.\n", _table(variants[REFERENCE], members, caps)]
        parts += [
            f"Stage 2 trained {one['training']['steps']} steps on {one['training']['samples']} mined pictures.\n"
            for one in members.values()
            if one.get("training", {}).get("stage") == "answers"
        ]
        if key == "sinks" and facts.get("sinks") == 0:
            parts.append("No cell of any label map is a sink, so there was nothing to remove from the labels.\n")
        for one in members.values():
            pairs = [c["against"]["interval"] for c in one["caps"].values() if "against" in c]
            said = verdict(group.better if one.get("checks", True) else "", pairs)
            verdicts.append([f"{group.title}: {one['title']}", group.paper, said])
    parts += [f"Left out: {note}\n" for note in figures["notes"]]
    if figures["gates"]:
        parts += ["### Consistency-aware against naive gate labels, and what may decide in the gate's place\n"]
        parts += [f"Paper: {GATE_PAPER}. `map` and `answer` are values of `decide_by`, which needs no training.\n"]
        parts += _gates(figures["gates"], caps)
        verdicts.append(["Gate labels", GATE_PAPER, gate_verdict(figures["gates"], caps)])
    if len(verdicts) > 1:
        parts += ["### What reproduced\n", markdown_table(verdicts)]
    return "\n".join(parts).rstrip() + "\n"


def _table(reference: Mapping[str, Any], members: Mapping[str, Mapping[str, Any]], caps: Sequence[int]) -> str:
    head = ["Variant", "maps", "threshold"]
    for cap in caps:
        head += [f"{cap}: accuracy", "difference", "95 %", "hit", "area", "tokens"]
    rows = [head]
    for one in (reference, *members.values()):
        maps = one.get("labels", {}).get("usable")
        cells = [one["title"], "–" if maps is None else str(maps), f"{one['threshold']:g}"]
        for cap in caps:
            found = one["caps"][str(cap)]
            pair = found.get("against")
            cells += [percent(found["accuracy"])]
            cells += [percent(pair["difference"], sign=True), interval(pair["interval"])] if pair else ["–", "–"]
            cells += [percent(found["hit"]), percent(found["area"]), f"{found['tokens'] or 0:.0f}"]
        rows.append(cells)
    return markdown_table(rows)


def _gates(gates: Mapping[str, Any], caps: Sequence[int]) -> list[str]:
    head = ["Gate", "samples"]
    for cap in caps:
        head += [f"{cap}: never", "always", "skipped at no loss", "at a point's loss"]
    rows, notes = [head], []
    for strategy, one in gates.items():
        if "note" in one:
            notes.append(f"- {strategy}: {one['note']}")
            continue
        cells = [strategy, str(one.get("training", {}).get("samples", "–"))]
        for cap in caps:
            found = one["caps"][str(cap)]
            cells += [percent(found[key]) for key in ("never", "always", "skip_no_loss", "skip_one_point")]
        rows.append(cells)
    return [*([markdown_table(rows)] if len(rows) > 1 else []), *notes, ""]


def gate_verdict(gates: Mapping[str, Any], caps: Sequence[int]) -> str:
    """Whether the consistent labels skip more at no loss, at every cap."""
    pair = [gates.get(name) for name in ("consistency", "prediction_vs_gt")]
    if any(one is None or "note" in one for one in pair):
        return "could not be tried"
    more = []
    for cap in caps:
        consistent, naive = (one["caps"][str(cap)]["skip_no_loss"] for one in pair)  # type: ignore[index]
        more.append((consistent or 0.0) - (naive or 0.0))
    said = ", ".join(f"{100 * value:+.1f} points at {cap}" for cap, value in zip(caps, more, strict=True))
    word = "same direction" if min(more) > 0 else "the opposite" if max(more) < 0 else "not told apart"
    return f"{word} ({said}; no interval)"
