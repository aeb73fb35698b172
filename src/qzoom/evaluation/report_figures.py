"""The figures of a report: runs grouped by their questions, means with intervals, paired differences, Pareto fronts.

Questions about one image are not independent, so intervals are bootstrapped over images instead of questions. Every run
is scored on the same resamples, so that differences are paired.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qzoom.data.samples import AnswerRow, answer_files, read_answers
from qzoom.errors import DataError
from qzoom.evaluation.flops import ModelShape, answer_flops
from qzoom.evaluation.score import row_score
from qzoom.scoring.intervals import bootstrap, interval_of
from qzoom.scoring.metrics import hit

COSTS = {
    "seconds": "seconds per question",
    "visual_tokens": "visual tokens per question",
    "gflops": "GFLOPs per question",
}
"""Names of the costs and how they read."""
ZOOMING = ("qzoom", "always")
"""Methods in which the model itself chooses where to zoom."""
_OWN_OPTIONS = ("method", "zoom", "coarse_tokens", "region_tokens", "gate_threshold", "region_threshold")
"""Options in which runs of a report are meant to differ."""
_ENCLOSED = re.compile(r"<\|\w+\|><\|image(_pad)?\|><\|\w+\|>")
"""A picture's place in a rendered prompt of the families that put a token before and after each picture and crop."""


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One line of the table; shares from 0 to 1, None for a share of nothing."""

    label: str
    method: str
    model: str
    caps: tuple[int | None, int | None]  # most tokens of the coarse view and of the regions
    accuracy: float  # mean of the task's metric
    interval: tuple[float, float]
    difference: float | None  # accuracy less that of the best plain run
    difference_interval: tuple[float, float] | None  # its 95 % interval, by pairs; None without a plain run
    zoomed: float  # share of questions for which a region was read
    hit_rate: float | None  # of the zooms on questions with known places, the share that holds one
    seconds: float
    visual_tokens: float
    gflops: float | None
    errors: int  # questions that failed and count as wrong

    def cost(self, name: str) -> float | None:
        """One of `COSTS`."""
        value = getattr(self, name)
        return None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """All figures of one task."""

    name: str
    questions: int
    pictures: int
    dropped: int  # pictures that not every run answered
    mixed: dict[str, list[Any]]  # options beside method and limits in which the runs differ, with their values
    runs: tuple[RunFigures, ...]
    best_plain: str | None  # label of the most accurate plain run, which the others are compared with; None without one
    fronts: dict[str, tuple[str, ...]]  # for each cost the labels of the runs that no other beats in both
    # the cheapest zooming run at least as accurate as the best plain one, and its savings; None when there is none
    equal_accuracy: dict[str, Any] | None
    # zooming runs beside the plain run of the same total, with the difference by pairs
    equal_budget: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def measure(group: TaskRuns, seed: int = 0) -> TaskFigures:
    """The figures of one task."""
    scores = np.array([[row_score(row) for row in run.rows] for run in group.runs])
    names = [row.picture for row in group.runs[0].rows]
    drawn = bootstrap(scores, names, seed)
    means, labels = scores.mean(1), group.labels
    plains = [i for i, run in enumerate(group.runs) if run.method == "plain"]
    best = min(plains, key=lambda i: (-means[i], _mean_tokens(group.runs[i]))) if plains else None
    lines = []
    for i, (run, label) in enumerate(zip(group.runs, labels, strict=True)):
        difference = None if best is None else float(means[i] - means[best])
        paired = None if best is None else interval_of(drawn[i] - drawn[best])
        ends = interval_of(drawn[i])
        lines.append(
            _line(run, label, float(means[i]), interval=ends, difference=difference, difference_interval=paired)
        )
    return TaskFigures(
        name=group.name,
        questions=len(names),
        pictures=len(set(names)),
        dropped=group.dropped,
        mixed=group.mixed,
        runs=tuple(lines),
        best_plain=None if best is None else labels[best],
        fronts={cost: front(lines, cost) for cost in COSTS},
        equal_accuracy=None if best is None else _equal_accuracy(lines, lines[best]),
        equal_budget=tuple(_equal_budget(group, lines, means, drawn)),
    )


def front(lines: Sequence[RunFigures], cost: str) -> tuple[str, ...]:
    """Labels of the runs that no other run matches or beats in accuracy and cost and beats in one, cheapest first."""
    known = [(price, line.accuracy, line.label) for line in lines if (price := line.cost(cost)) is not None]
    kept = []
    for price, accuracy, label in known:
        beaten = any(p <= price and a >= accuracy and (p < price or a > accuracy) for p, a, _ in known)
        if not beaten:
            kept.append((price, accuracy, label))
    return tuple(label for _, _, label in sorted(kept))


def _line(run: Run, label: str, accuracy: float, **comparison: Any) -> RunFigures:
    """A run's line; `comparison` holds its interval, its difference to the best plain run, and that one's interval."""
    rows = run.rows
    placed = [row for row in rows if row.zoomed and row.boxes]
    hits = sum(hit([region.box for region in row.regions], row.boxes) for row in placed)
    operations = [cost for row in rows if (cost := run.gflops(row)) is not None]
    return RunFigures(
        label=label,
        method=run.method,
        model=run.model,
        caps=run.caps,
        accuracy=accuracy,
        zoomed=sum(row.zoomed for row in rows) / len(rows),
        hit_rate=hits / len(placed) if placed else None,
        seconds=float(np.mean([row.seconds for row in rows])),
        visual_tokens=_mean_tokens(run),
        gflops=float(np.mean(operations)) if operations else None,
        errors=sum(row.error is not None for row in rows),
        **comparison,
    )


def _mean_tokens(run: Run) -> float:
    tokens = [row.visual_tokens for row in run.rows if row.error is None]
    return float(np.mean(tokens)) if tokens else 0.0


def _equal_accuracy(lines: Sequence[RunFigures], plain: RunFigures) -> dict[str, Any] | None:
    """The cheapest of the model's own zooming runs that is at least as accurate as the best plain run."""
    able = [line for line in lines if line.method in ZOOMING and line.accuracy >= plain.accuracy]
    able = [line for line in able if line.model == plain.model]
    if not able:
        return None
    best = min(able, key=lambda line: (line.seconds, line.visual_tokens))
    return {
        "run": best.label,
        "plain": plain.label,
        "accuracy": best.accuracy,
        "plain_accuracy": plain.accuracy,
        "throughput": plain.seconds / best.seconds if best.seconds else None,
        "tokens_saved": 1 - best.visual_tokens / plain.visual_tokens if plain.visual_tokens else None,
    }


def _equal_budget(
    group: TaskRuns, lines: Sequence[RunFigures], means: np.ndarray, drawn: np.ndarray
) -> list[dict[str, Any]]:
    """Every zooming run beside the plain run of its model and total that was asked in the same way otherwise; where
    there is none or are several, the most accurate counts."""
    plain: dict[tuple[str, int | None], list[int]] = {}
    for i, run in enumerate(group.runs):
        if run.method == "plain":
            plain.setdefault((run.model, run.total_cap), []).append(i)
    out = []
    for i, run in enumerate(group.runs):
        able = plain.get((run.model, run.total_cap))
        if run.method not in ZOOMING or run.total_cap is None or not able:
            continue
        alike = [j for j in able if group.runs[j].other_options == run.other_options]
        other = max(alike or able, key=lambda j: means[j])
        out.append(
            {
                "cap": run.total_cap,
                "run": lines[i].label,
                "plain": lines[other].label,
                "difference": float(means[i] - means[other]),
                "interval": interval_of(drawn[i] - drawn[other]),
                "throughput": lines[other].seconds / lines[i].seconds if lines[i].seconds else None,
            }
        )
    return sorted(out, key=lambda item: (item["cap"], item["run"]))


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One answer file."""

    path: Path
    about: dict[str, Any]  # what ran: model name, versions, sizes
    settings: dict[str, Any]  # what decided the answers
    rows: tuple[AnswerRow, ...]

    @property
    def method(self) -> str:
        """The method; "plain" and "always" also when they were asked for by the zoom mode."""
        options = self.settings.get("options", {})
        name = str(options.get("method", "qzoom"))
        if name != "qzoom":
            return name
        return {"never": "plain", "always": "always"}.get(str(options.get("zoom", "auto")), "qzoom")

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.about.get("model", "model"))

    @property
    def caps(self) -> tuple[int | None, int | None]:
        """Most tokens of the coarse view and of the regions; None for the model's own or for none."""
        options = self.settings.get("options", {})
        coarse, region = (options.get(f"{name}_tokens") for name in ("coarse", "region"))
        most = [limits["max_tokens"] if isinstance(limits, dict) else None for limits in (coarse, region)]
        return most[0], None if self.method == "plain" else most[1]

    @property
    def total_cap(self) -> int | None:
        """Most visual tokens of a question; None when a limit is not stated."""
        coarse, region = self.caps
        if coarse is None or (region is None and self.method != "plain"):
            return None
        return coarse + (region or 0)

    @property
    def other_options(self) -> dict[str, Any]:
        """The options that neither the method nor its limits and thresholds explain, such as `max_new_tokens`."""
        options: dict[str, Any] = self.settings.get("options", {})
        return {name: value for name, value in options.items() if name not in _OWN_OPTIONS}

    @property
    def label(self) -> str:
        """Method and limits, e.g. "qzoom, ≤ 144 + 144"."""
        coarse, region = ("own" if cap is None else str(cap) for cap in self.caps)
        return f"{self.method}, ≤ {coarse}" + ("" if self.method == "plain" else f" + {region}")

    @property
    def key(self) -> tuple[Any, ...]:
        """Order within a report: method, then limits, then what else decided the answers."""
        order = ("plain", "qzoom", "always")
        place = order.index(self.method) if self.method in order else len(order)
        coarse, region = (cap or 0 for cap in self.caps)
        return place, self.method, coarse + region, coarse, self.model, json.dumps(self.settings, sort_keys=True)

    def gflops(self, row: AnswerRow) -> float | None:
        """Operations of one answer in units of 10^9; None where the run did not note the model's sizes."""
        sizes = self.about.get("shape")
        if not isinstance(sizes, dict) or row.error is not None:
            return None
        asked = row.gate is not None and row.gate.score is not None
        by = self.about.get("decide_by", "gate") if self.method == "qzoom" else "gate"
        learned = self.method in (*ZOOMING, "margin", "entropy")
        proposed = row.zoomed or bool(row.gate and row.gate.note.startswith("No region stood out"))
        usage, extra = row.usage, rounds(self.method, row)
        return 1e-9 * answer_flops(
            ModelShape(**sizes),
            coarse_tokens=usage.coarse_tokens,
            region_tokens=usage.region_tokens,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            gate=asked and self.method == "qzoom" and by == "gate",
            region_branch=learned and (proposed or (asked and by == "map")),
            encoded_tokens=row.encoded_tokens if self.about.get("sparse") else None,
            looked_tokens=self.about.get("answer_tokens", 0) if asked and by == "answer" else 0,
            reread_tokens=sum(region.tokens for region in row.regions if region.reread),
            upper_tokens=extra.get("upper_tokens", 0),
            other_tokens=extra.get("other_tokens", 0),
            other_text_tokens=extra.get("other_text_tokens", 0),
            other_completion_tokens=extra.get("completion_tokens", 0),
        )


def rounds(method: str, row: AnswerRow) -> dict[str, int]:
    """What a method paid on top of an answer, see `qzoom.evaluation.methods.base.Answered`.

    Rows of earlier versions hold one sum of prompt tokens. It is the own prompt's for the confidence gates, another
    question's for "agentic", and both for "attention", whose own prompt is the answered one without the regions and
    the tokens that enclose them. The pictures end where the session's shared prefix does.
    """
    extra, usage = {name: int(value) for name, value in row.extra.items()}, row.usage
    both = extra.pop("prompt_tokens", 0)
    if not both:
        return extra
    if method in ("margin", "entropy"):
        return extra | {"upper_tokens": both}
    inserted = usage.region_tokens + (2 * len(row.regions) if _ENCLOSED.search(row.prompt) else 0)
    own = usage.prompt_tokens - inserted if method == "attention" else 0
    other = both - own
    return extra | {
        "upper_tokens": own,
        "other_tokens": other,
        "other_text_tokens": other - max(usage.reused_tokens, usage.coarse_tokens),
    }


@dataclass(frozen=True, slots=True, eq=False)
class TaskRuns:
    """Runs over the same questions."""

    name: str
    questions: dict[str, Any]  # what decides them (digest, seeds)
    runs: tuple[Run, ...]  # in the report's order; their rows are those of the pictures that all of them answered
    dropped: int  # pictures that not all runs answered

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each run, unique in this task."""
        several = len({run.model for run in self.runs}) > 1
        names = [f"{run.model}: {run.label}" if several else run.label for run in self.runs]
        for name in {name for name in names if names.count(name) > 1}:
            same = [i for i, other in enumerate(names) if other == name]
            for i, part in zip(same, _differing([self.runs[i].path for i in same]), strict=True):
                names[i] = f"{name} ({part})"
        return tuple(names)

    @property
    def mixed(self) -> dict[str, list[Any]]:
        """Options beside method and limits in which the runs differ, the seed aside, with their values."""
        options = [run.other_options for run in self.runs]
        names = sorted({name for one in options for name in one} - {"seed"})
        values = {name: list(dict.fromkeys(json.dumps(one.get(name)) for one in options)) for name in names}
        return {name: [json.loads(value) for value in own] for name, own in values.items() if len(own) > 1}


def _differing(paths: Sequence[Path]) -> list[str]:
    """A name for each file: the last part of the paths in which all differ, else their ends, else numbers."""
    parts = [(*path.absolute().parent.parts, path.stem) for path in paths]
    lengths = range(1, min(map(len, parts)) + 1)
    for names in (*([p[-k] for p in parts] for k in lengths), *(["/".join(p[-k:]) for p in parts] for k in lengths)):
        if len(set(names)) == len(names):
            return names
    return [f"{own[-1]}, {number}" for number, own in enumerate(parts, start=1)]


def read_runs(places: Sequence[Path]) -> list[Run]:
    """All answer files named, or lying below the folders named (DataError: nothing there, or a file that holds
    something else)."""
    return [read_run(path) for path in answer_files(places)]


def read_run(path: Path) -> Run:
    """One answer file; it is not changed (DataError: it holds something else, or no answers yet)."""
    header, rows = read_answers(path)
    if not rows:
        raise DataError(f"{path} holds no answers yet; let its run finish, or leave it out.")
    return Run(path, dict(header.get("about") or {}), header["settings"], tuple(rows))


def group_runs(runs: Sequence[Run]) -> list[TaskRuns]:
    """Runs by their questions, in the order of the tasks' names; only pictures that all runs answered are compared
    (DataError: two runs over the same questions have no picture in common, or asked them differently)."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings.get("questions", {}), sort_keys=True), []).append(run)
    out = []
    for text, members in groups.items():
        questions = json.loads(text)
        ordered = sorted(members, key=lambda run: run.key)
        common = set.intersection(*({row.picture for row in run.rows} for run in ordered))
        every = set.union(*({row.picture for row in run.rows} for run in ordered))
        if not common:
            raise DataError(f"The runs {', '.join(str(run.path) for run in ordered)} have no picture in common.")
        cut = tuple(Run(run.path, run.about, run.settings, _of(run.rows, common, ordered[0].rows)) for run in ordered)
        asked = [[(row.picture, row.index, row.question, row.answer) for row in run.rows] for run in cut]
        for run, mine in zip(cut, asked, strict=True):
            if mine != asked[0]:
                raise DataError(f"{run.path} and {cut[0].path} name the same questions, but asked different ones.")
        name = str(questions.get("task", "questions"))
        out.append(TaskRuns(name, questions, cut, len(every - common)))
    return sorted(out, key=lambda group: (group.name, json.dumps(group.questions, sort_keys=True)))


def _of(rows: Sequence[AnswerRow], pictures: set[str], first: Sequence[AnswerRow]) -> tuple[AnswerRow, ...]:
    """The rows about these pictures, pictures in the order of the first run."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row.picture for row in first))}
    return tuple(sorted((r for r in rows if r.picture in pictures), key=lambda row: (order[row.picture], row.index)))
