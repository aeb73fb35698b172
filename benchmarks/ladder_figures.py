"""Figures and texts of `benchmarks.ladder`: equal accuracy, equal budget, maxima, and theoretical limits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.choices import Point, interval_by_picture, lowest_match, paired, plain_peak
from benchmarks.evidence import KINDS, Line, Look
from benchmarks.ladder_time import BATCHED, HEADLINE, PAIRS, SHARED
from qzoom.evaluation.tables import interval, markdown_table, percent, write_figures

if TYPE_CHECKING:
    from qzoom.data.samples import AnswerRow, Task
    from qzoom.evaluation.report_figures import Run

GOALS = {"scenes": (4.39, 0.73), "documents": (2.52, 0.53), "receipts": (2.52, 0.53)}
"""Throughput and share of visual tokens saved at equal accuracy, as the paper reports them (9x and 5x are the aims)."""
PEAK_GOALS = {"scenes": 0.081, "documents": 0.011}
"""How far above the plain model's peak the zooming one's should be."""
NOTE = (
    "Accuracy is the share of exact matches (case, spaces and currency forgiven), in per cent. Intervals hold in 95 % "
    "of cases and come from drawing pictures with replacement; differences are those of pairs. `tokens` are mean "
    "visual tokens per question, both looks; GFLOPs are computed from the model's sizes as if each question were asked "
    "alone. Splits and gate thresholds were chosen on other pictures than those reported. The peaks are the best of "
    "all caps on the reported pictures, for both models alike. The cap of equal accuracy is chosen on them too: it is "
    "the lowest at which zooming is at least as accurate as the plain peak there, which favours zooming, as the choice "
    "of the plain peak favours the plain model. The intervals leave these choices out of account."
)


def point_of(look: Look, rows: Sequence[AnswerRow], run: Run) -> Point:
    """A way to look and what it came to."""
    from qzoom.evaluation.score import row_score

    costs = [cost for row in rows if (cost := run.gflops(row)) is not None]
    tokens = [row.visual_tokens for row in rows if row.error is None]
    return Point(
        look.coarse,
        look.region,
        look.gate,
        _mean(row_score(row) for row in rows),
        _mean(tokens),
        _mean(costs),
    )


def task_figures(
    task: Task, plain: Mapping[int, Line], zoom: Mapping[int, Line], caps: Sequence[int]
) -> dict[str, Any]:
    """All figures of one kind of pictures but the times, as JSON values.

    Args:
        task: the reported questions.
        plain: the plain model by cap, those that are finished.
        zoom: the zooming one.
        caps: the whole ladder.
    """
    points = {cap: point_of(Look(cap), line.rows, line.run) for cap, line in plain.items()}
    zooms = {cap: point_of(Look(0, cap), line.rows, line.run) for cap, line in zoom.items()}
    peak = plain_peak(points.values())
    found: dict[str, Any] = {
        "questions": len(plain[peak.cap].rows),
        "pictures": len(task.ids),
        "finished": set(plain) == set(zoom) == set(caps),
        "plain": [_line(points[cap], plain[cap]) for cap in points],
        "zoom": [_line(zooms[cap], zoom[cap]) | _against(zoom[cap], plain.get(cap), points.get(cap)) for cap in zooms],
        "plain_peak": peak.cap,
        "full_size": _full_size(plain[max(plain)].rows),
        "bound": _bound(plain[peak.cap]),
        "times": {},
    }
    if zoom:
        best = max(zooms.values(), key=lambda p: (p.accuracy, -p.cap))
        found["peaks"] = {"plain": peak.cap, "zoom": best.cap} | paired(zoom[best.cap].rows, plain[peak.cap].rows)
        match = lowest_match(zooms.values(), peak.accuracy)
        found["match"] = None if match is None else _match(match, zoom[match.cap], peak, plain[peak.cap])
    return found


def _line(point: Point, line: Line) -> dict[str, Any]:
    from qzoom.scoring.metrics import hit

    rows = line.rows
    placed = [row for row in rows if row.zoomed and row.boxes]
    return {
        "cap": point.cap,
        "looks": line.words,
        "gate": line.gates,
        "accuracy": point.accuracy,
        "interval": list(interval_by_picture(rows)),
        "tokens": point.tokens,
        "gflops": point.gflops,
        "zoomed": _mean(row.zoomed for row in rows),
        "hit": _mean(hit([r.box for r in row.regions], row.boxes) for row in placed) if placed else None,
        "errors": sum(row.error is not None for row in rows),
    }


def _against(line: Line, plain: Line | None, point: Point | None) -> dict[str, Any]:
    """The zooming model beside the plain one of the same cap."""
    if plain is None or point is None:
        return {}
    return {"against_plain": paired(line.rows, plain.rows)}


def _match(match: Point, line: Line, peak: Point, plain: Line) -> dict[str, Any]:
    return {
        "cap": match.cap,
        "looks": line.words,
        "gate": line.gates,
        "tokens_saved": 1 - match.tokens / peak.tokens if peak.tokens else None,
        "gflops_ratio": peak.gflops / match.gflops if match.gflops else None,
    } | paired(line.rows, plain.rows)


def _full_size(rows: Sequence[AnswerRow]) -> float:
    """Share of questions whose plain look has at least as many pixels as the picture."""
    shown = [(row.coarse_size_px or (0, 0), row.size_px) for row in rows]
    return _mean(look[0] * look[1] >= 0.98 * size[0] * size[1] for look, size in shown)


def _bound(line: Line) -> float | None:
    """How many times fewer operations than the plain peak a look without any visual token would take."""
    from qzoom.evaluation.flops import ModelShape, answer_flops

    sizes = line.run.about.get("shape")
    rows = [row for row in line.rows if row.error is None]
    if not isinstance(sizes, dict) or not rows:
        return None
    shape, spent, least = ModelShape(**sizes), 0.0, 0.0
    for row in rows:
        text = row.usage.prompt_tokens - row.usage.coarse_tokens
        spent += line.run.gflops(row) or 0.0
        least += 1e-9 * answer_flops(
            shape,
            coarse_tokens=0,
            region_tokens=0,
            prompt_tokens=text,
            completion_tokens=row.usage.completion_tokens,
            gate=False,
            region_branch=False,
        )
    return spent / least if least else None


def write_ladder(
    folder: Path, found: Mapping[str, dict[str, Any]], ran: Mapping[str, Any], limit: int | None
) -> dict[str, Any]:
    """Write ladder.json and ladder.md; returns what the first holds.

    Kinds of pictures whose answers are elsewhere keep the figures that the files have of the same weights, and the page
    says so.
    """
    kept = {} if limit is not None else _kept(folder / "ladder.json", ran)
    found = {kind: found.get(kind) or kept[kind] | {"kept": True} for kind in KINDS if kind in found or kind in kept}
    figures = {"about": dict(ran), "limit": limit, "kinds": found}
    parts = ["## The ladder: plain and zooming at every cap\n", f"{NOTE}\n"]
    parts.append(
        f"Model `{ran['model']}` (weights `{ran['weights']}`, {ran['dtype']}, {ran['device']}, "
        f"{ran['threads']} threads, torch {ran['torch']}). Made by `python -m benchmarks.ladder`.\n"
    )
    if limit is not None:
        parts.append(f"**A trial with at most {limit} pictures of each kind: no evidence.**\n")
    for kind, one in found.items():
        parts += [f"### {kind.capitalize()}\n", *words(kind, one), ""]
    write_figures(folder, "ladder", figures, "\n".join(parts).rstrip() + "\n")
    return figures


def _kept(path: Path, ran: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an earlier page; none of other weights, of a trial, or of a file that cannot be read."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = earlier["about"]["weights"] == ran["weights"] and earlier["limit"] is None
        return dict(earlier["kinds"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def words(kind: str, found: dict[str, Any]) -> list[str]:
    """One kind of pictures as Markdown."""
    out = [f"{found['questions']} questions about {found['pictures']} pictures."]
    if not found["finished"]:
        out[0] += " **Not finished: caps are missing.**"
    if found.get("kept"):
        out[0] += " Figures of an earlier run of the same weights, with the splits that were offered then."
    out += ["", _table(found)]
    out += [
        f"- {sentence}" for sentence in [*_equal_accuracy(kind, found), *_equal_budget(found), *_peaks(kind, found)]
    ]
    return [*out, *(f"- {sentence}" for sentence in _arithmetic(found))]


def _table(found: dict[str, Any]) -> str:
    head = ["Cap", "plain", "tokens", "GFLOPs", "split", "gate", "zooming", "tokens", "GFLOPs", "zoomed", "hit"]
    rows = [[*head, "difference", "95 %"]]
    zooms = {line["cap"]: line for line in found["zoom"]}
    plains = {line["cap"]: line for line in found["plain"]}
    for cap in sorted({*plains, *zooms}):
        left, right = plains.get(cap), zooms.get(cap)
        cells = [str(cap), *(_cells(left) if left else ["–"] * 3)]
        cells += [right["looks"], right["gate"], *_cells(right)] if right else ["–"] * 5
        cells += [percent(right["zoomed"]), percent(right["hit"])] if right else ["–"] * 2
        pair = right.get("against_plain") if right else None
        cells += [percent(pair["difference"], sign=True), interval(pair["interval"])] if pair else ["–"] * 2
        rows.append(cells)
    return markdown_table(rows)


def _cells(line: dict[str, Any]) -> list[str]:
    return [percent(line["accuracy"]), f"{line['tokens']:.0f}", f"{line['gflops']:.3g}"]


def _equal_accuracy(kind: str, found: dict[str, Any]) -> Iterable[str]:
    peak, match = found["plain_peak"], found.get("match")
    if match is None:
        yield f"Equal accuracy: no cap at which zooming matches the plain peak (at {peak} tokens)."
        return
    goal, saved = GOALS[kind]
    timed = found["times"].get(HEADLINE)
    speed = (
        f"{timed['ratio']:.2f} times its throughput ({timed['interval'][0]:.2f} to {timed['interval'][1]:.2f}, "
        f"{timed['questions']} questions in turn)"
        if timed
        else "a throughput that was not timed (`--time`)"
    )
    yield (
        f"Equal accuracy: at a cap of {match['cap']} ({match['looks']}, gate {match['gate']}) zooming is "
        f"{percent(match['difference'], sign=True)} points ({interval(match['interval'])}) from the plain peak "
        f"at {peak} tokens, at {speed}, with {percent(match['tokens_saved'])} % fewer visual tokens and "
        f"{match['gflops_ratio'] or 0:.2f} times fewer operations. The goal was {goal} times and {percent(saved)} %."
    )
    for name, pictures in ((BATCHED, "different pictures"), (SHARED, "the same pictures, which are encoded once")):
        at_once = found["times"].get(name)
        if at_once is None:
            yield f"In batches of questions about {pictures} this pair was not timed."
        else:
            yield (
                f"In batches of {at_once['batch']} questions about {pictures}, the same pair is at "
                f"{at_once['ratio']:.2f} times the throughput ({at_once['interval'][0]:.2f} to "
                f"{at_once['interval'][1]:.2f}, {at_once['questions']} questions, batches in turn)."
            )
    if timed and timed["bound"]:
        yield (
            f"Timed, {timed['plain_s']:.3f} s a question of the plain peak, of which "
            f"{timed['plain_decode_s']:.3f} s write the answer: a look that cost nothing would be "
            f"{timed['bound']:.2f} times as fast."
        )


def _equal_budget(found: dict[str, Any]) -> Iterable[str]:
    pairs = {line["cap"]: line["against_plain"] for line in found["zoom"] if "against_plain" in line}
    sure = [cap for cap, pair in pairs.items() if pair["interval"][0] > 0]
    worse = [cap for cap, pair in pairs.items() if pair["interval"][1] < 0]
    rest = [cap for cap in pairs if cap not in sure and cap not in worse]
    text = [f"better at {_list(sure)}"] if sure else []
    text += [f"worse at {_list(worse)}"] if worse else []
    text += [f"not told apart at {_list(rest)}"] if rest else []
    if text:
        yield f"Equal budget: zooming is {'; '.join(text)} tokens."
    timed = {int(name): one for name, one in found["times"].items() if name not in PAIRS}
    missing = [cap for cap in pairs if cap not in timed]
    if timed:
        each = ", ".join(f"{cap}: {one['ratio']:.2f}" for cap, one in sorted(timed.items()))
        slower = [cap for cap, one in sorted(timed.items()) if one["ratio"] < 1]
        said = f"slower at {_list(slower)}" if slower else "no slower at any of these"
        yield f"Throughput of zooming by that of the plain model of the same cap: {each}; so {said}."
    if missing:
        yield f"Zooming and the plain model of the same cap were not timed at {_list(missing)} tokens."


def _peaks(kind: str, found: dict[str, Any]) -> Iterable[str]:
    peaks = found.get("peaks")
    if peaks is None:
        return
    goal = f" The goal was {percent(PEAK_GOALS[kind], sign=True)}." if kind in PEAK_GOALS else ""
    yield (
        f"Peaks: zooming (cap {peaks['zoom']}) {percent(peaks['difference'], sign=True)} points "
        f"({interval(peaks['interval'])}) against plain (cap {peaks['plain']}), right alone {peaks['only_first']} "
        f"against {peaks['only_second']} of {peaks['questions']} questions.{goal}"
    )


def _arithmetic(found: dict[str, Any]) -> Iterable[str]:
    top = found["plain"][-1]
    if found["full_size"] >= 0.5:
        yield (
            f"At {top['cap']} tokens the plain look shows {percent(found['full_size'])} % of the pictures at full "
            "size: there a zoom can add no detail, only save tokens."
        )
    if top["interval"][1] >= 0.995:
        yield f"At {top['cap']} tokens the plain model reads everything: no zoom can be more accurate there."
    if found["bound"] is not None:
        yield (
            f"Text and answer alone take 1/{found['bound']:.1f} of the plain peak's operations: no way of looking can "
            "save more than that."
        )


def _list(caps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(caps)))


def _mean(values: Iterable[float]) -> float:
    kept = [float(value) for value in values]
    return sum(kept) / len(kept) if kept else 0.0
