"""The runs of a report: answer files read, named, and grouped by the questions that they asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import DataError
from qzoom.evaluation.flops import ModelShape, answer_flops
from qzoom.evaluation.records import AnswerRow
from qzoom.evaluation.store import read_answers

__all__ = ["Run", "TaskRuns", "group_runs", "read_run", "read_runs"]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One answer file.

    Args:
        path: the file.
        about: what ran: model name, versions, sizes.
        settings: what decided the answers.
        rows: the answers.
    """

    path: Path
    about: dict[str, Any]
    settings: dict[str, Any]
    rows: tuple[AnswerRow, ...]

    @property
    def method(self) -> str:
        """How it looked; "plain" and "always" also when they were asked for by the zoom mode."""
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
        """Most tokens of the coarse look and of the regions; None for the model's own or for none."""
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
        learned = self.method in ("qzoom", "always", "margin", "entropy")
        proposed = row.zoomed or bool(row.gate and row.gate.note.startswith("No region stood out"))
        usage, extra = row.usage, row.extra
        return 1e-9 * answer_flops(
            ModelShape(**sizes),
            coarse_tokens=usage.coarse_tokens,
            region_tokens=usage.region_tokens,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            gate=asked and self.method == "qzoom",
            region_branch=learned and proposed,
            extra_prompt_tokens=int(extra.get("prompt_tokens", 0)),
            extra_completion_tokens=int(extra.get("completion_tokens", 0)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class TaskRuns:
    """Runs over the same questions.

    Args:
        name: of the task.
        questions: what decides them (digest, seeds).
        runs: in the report's order; their rows are those of the pictures that all of them answered.
        dropped: pictures that not all runs answered.
    """

    name: str
    questions: dict[str, Any]
    runs: tuple[Run, ...]
    dropped: int

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each run, unique in this task."""
        several = len({run.model for run in self.runs}) > 1
        names = [f"{run.model}: {run.label}" if several else run.label for run in self.runs]
        return tuple(f"{name} ({run.path.stem})" if names.count(name) > 1 else name for name, run in self.named(names))

    def named(self, names: Sequence[str]) -> Iterable[tuple[str, Run]]:
        """Names beside their runs."""
        return zip(names, self.runs, strict=True)


def read_runs(places: Sequence[Path]) -> list[Run]:
    """All answer files named, or lying in the folders named.

    Raises:
        DataError: nothing there, or a file that holds something else.
    """
    files: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            files |= dict.fromkeys(sorted(place.rglob("*.jsonl")))
        elif place.is_file():
            files[place] = None
        else:
            raise DataError(f"{place}: no such file or folder; name answer files that `qzoom eval` kept.")
    if not files:
        raise DataError(f"{', '.join(map(str, places))}: no answer files (*.jsonl); keep some with `qzoom eval`.")
    return [read_run(path) for path in files]


def read_run(path: Path) -> Run:
    """One answer file; it is not changed.

    Raises:
        DataError: it holds something else, or no answers yet.
    """
    header, rows = read_answers(path)
    if not rows:
        raise DataError(f"{path} holds no answers yet; let its run finish, or leave it out.")
    return Run(path, dict(header.get("about") or {}), header["settings"], tuple(rows))


def group_runs(runs: Sequence[Run]) -> list[TaskRuns]:
    """Runs by their questions, in the order of the tasks' names; only pictures that all runs answered are compared.

    Raises:
        DataError: two runs over the same questions have no picture in common, or asked them differently.
    """
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
