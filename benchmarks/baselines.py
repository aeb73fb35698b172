"""Zooming compared with all other methods: the same images, questions and limits, and the Pareto fronts.

    python -m benchmarks.baselines --data RECEIPTS --dry-run
    python -m benchmarks.baselines --data RECEIPTS

Asks every method of `qzoom eval --method` at one or two totals of visual tokens, half of them for the coarse view, and
writes docs/results/baselines.md. The plain model's answers are those of `benchmarks.ladder`; run it first to have them
at all limits. The same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.evidence import (
    CAPS,
    KINDS,
    Clock,
    Look,
    OutOfTimeError,
    Work,
    about,
    add_counts,
    ask,
    checked,
    finished,
    kept_run,
    load,
    parser,
    progress,
    run_main,
    tasks_of,
)
from benchmarks.ladder import place
from benchmarks.plan import print_plan
from qzoom.errors import HeadsMissingError
from qzoom.evaluation.tables import interval, markdown_table, percent, write_figures

if TYPE_CHECKING:
    from qzoom.data.samples import Task
    from qzoom.evaluation.report_figures import RunFigures, TaskFigures
    from qzoom.model import QZoom

NOTE = (
    "Every method sees the same pictures and questions under the same limits. `of plain`: operations as a share of "
    "those of the plain model with the same total. Seconds are means of runs in which the questions about a picture "
    "share its first look. The runs were made hours apart, so their seconds cannot be compared and have no front; "
    "`benchmarks.ladder --time` times two ways to look in turn. A run is on a front when no other one is at least as "
    "accurate at no more cost; the oracle, which is told where the answer is, does not count."
)
OURS = ("qzoom", "always")
COSTS = {"visual_tokens": "visual tokens", "gflops": "operations"}
"""Costs that do not depend on what else the machine did during a run."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--budgets", type=int, nargs="+", default=[144, 288], help="totals of visual tokens")
    add_counts(made, 600)
    made.add_argument("--methods", nargs="+", help="only these methods")
    return checked(made.parse_args(arguments))


def works(given: argparse.Namespace, root: Path, kinds: Sequence[str] = ()) -> Iterator[Work]:
    """Everything that is asked, of the wanted kinds unless others are named."""
    from qzoom.evaluation.methods import METHODS

    for task in tasks(given, kinds):
        for total in given.budgets:
            for method in given.methods or METHODS:
                path, look = _file(root, task, method, total)
                yield Work(task, look, path, f"{method} at {total}", given.max_new_tokens)


def _file(root: Path, task: Task, method: str, total: int) -> tuple[Path, Look]:
    if method == "plain":
        look = Look(total)
        return place(root, "report", task, look), look
    look = Look(total - total // 2, total // 2, None, method)
    return root / "baselines" / f"{task.name}-{look.name}.jsonl", look


def tasks(given: argparse.Namespace, kinds: Sequence[str] = ()) -> list[Task]:
    """The first of the pictures that the ladder reports."""
    return tasks_of(kinds or given.kinds, given.questions, given.data, 0, given.limit)


def figures_of(given: argparse.Namespace, root: Path, task: Task) -> TaskFigures | None:
    """The figures of one kind of pictures over all finished runs, the plain ladder's among them; None without any."""
    from qzoom.evaluation.report_figures import group_runs, measure

    paths = [work.path for work in works(given, root, [task.name])]
    paths += [place(root, "report", task, Look(cap)) for cap in CAPS]
    runs = [run for path in dict.fromkeys(paths) if (run := kept_run(path, task)) is not None]
    return measure(group_runs(runs)[0]) if runs else None


def fronts(task: TaskFigures) -> dict[str, dict[str, Any]]:
    """For each cost: who is on the front without the oracle, and what beats our runs that are not."""
    from qzoom.evaluation.report_figures import front

    lines = [line for line in task.runs if line.method != "oracle"]
    out = {}
    for cost in COSTS:
        best = front(lines, cost)
        beaten = {
            line.label: [o.label for o in lines if o.label in best and _beats(o, line, cost)]
            for line in lines
            if line.method in OURS and line.label not in best
        }
        out[cost] = {"front": best, "beaten": beaten}
    return out


def values_of(task: TaskFigures) -> dict[str, Any]:
    """One kind of pictures as JSON values, without comparisons of seconds between runs."""
    values = task.to_dict()
    del values["equal_accuracy"]  # chosen by seconds; the ladder's is timed
    values["fronts"] = {cost: task.fronts[cost] for cost in COSTS if cost in task.fronts}
    values["equal_budget"] = [{k: v for k, v in pair.items() if k != "throughput"} for pair in task.equal_budget]
    return values | {"without_oracle": fronts(task)}


def _beats(other: RunFigures, line: RunFigures, cost: str) -> bool:
    theirs, ours = other.cost(cost), line.cost(cost)
    return theirs is not None and ours is not None and theirs <= ours and other.accuracy >= line.accuracy


def report(given: argparse.Namespace, root: Path, ran: dict[str, Any]) -> dict[str, Any]:
    """Write what there is so far, of all kinds; returns the figures."""
    kinds, parts = {}, ["## Against every other way to look\n", f"{NOTE}\n"]
    parts.append(
        f"Model `{ran['model']}` (weights `{ran['weights']}`, {ran['dtype']}, {ran['device']}). Made by "
        "`python -m benchmarks.baselines`.\n"
    )
    if given.limit is not None:
        parts.append(f"**A trial with at most {given.limit} pictures of each kind: no evidence.**\n")
    left = {work.task.name for work in works(given, root, KINDS) if kept_run(work.path, work.task) is None}
    for task in tasks(given, KINDS):
        found = figures_of(given, root, task)
        if found is not None:
            kinds[task.name] = values_of(found) | {"finished": task.name not in left}
            parts += words(found, finished=task.name not in left)
    figures = {"about": ran, "limit": given.limit, "kinds": kinds}
    write_figures(given.results, "baselines", figures, "\n".join(parts).rstrip() + "\n")
    return figures


def words(task: TaskFigures, *, finished: bool) -> list[str]:
    """One kind of pictures as Markdown."""
    plain = {line.caps[0]: line for line in task.runs if line.method == "plain"}
    rows = [["Run", "accuracy", "95 %", "zoomed", "hit", "tokens", "GFLOPs", "of plain", "seconds", "failed"]]
    for line in task.runs:
        same = plain.get(sum(cap or 0 for cap in line.caps))
        part = line.gflops / same.gflops if same is not None and line.gflops and same.gflops else None
        rows.append(
            [
                line.label,
                percent(line.accuracy),
                interval(line.interval, sign=False),
                percent(line.zoomed),
                percent(line.hit_rate),
                f"{line.visual_tokens:.0f}",
                "–" if line.gflops is None else f"{line.gflops:.3g}",
                percent(part),
                f"{line.seconds:.3f}",
                str(line.errors),
            ]
        )
    state = "" if finished else " **Not finished: runs are missing.**"
    out = [f"### {task.name.capitalize()}\n", f"{task.questions} questions about {task.pictures} pictures.{state}\n"]
    out.append(markdown_table(rows))
    for cost, found in fronts(task).items():
        if not found["front"]:
            continue
        out.append(f"- Accuracy against {COSTS[cost]}, on the front: {_quoted(found['front'])}.")
        for label, others in found["beaten"].items():
            out.append(f"- Not on it: “{label}”, which {_quoted(others)} beats.")
    return [*out, ""]


def _quoted(labels: Sequence[str]) -> str:
    return ", ".join(f"“{label}”" for label in labels)


def every(given: argparse.Namespace, root: Path, model: QZoom, clock: Clock) -> None:
    """Ask all that is not kept yet."""
    for work in works(given, root):
        ask(model, work, clock, progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when all is done, 3 when the time was over first."""
    given = parse(arguments)
    model, digest = load(given.model, given.device)
    if not model.has_region:
        raise HeadsMissingError(f"{given.model} has no region branch, so there is no zooming to measure.")
    root, clock = given.runs / digest, Clock(given.minutes)
    if given.dry_run:
        print_plan(model, works(given, root))
        return 0
    try:
        every(given, root, model, clock)
        done = True
    except OutOfTimeError:
        done = False
    report(given, root, about(model))
    return finished(given, "baselines", done=done)


if __name__ == "__main__":
    run_main(main)
