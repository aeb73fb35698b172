"""Accuracy with and without zooming over a range of visual-token limits.

    python -m benchmarks.ladder --data RECEIPTS --dry-run     # the plan and the estimated time
    python -m benchmarks.ladder --data RECEIPTS               # ask, then write docs/results/ladder.md
    python -m benchmarks.ladder --data RECEIPTS --time        # then, on a quiet machine, the times side by side

1. Calibration, on separate synthetic images: every split of the tokens between coarse view and region, with the gate
   and always zoomed; gate thresholds are tried on the stored scores. At each limit the cheapest split within half a
   point of the best one is chosen; at the largest limit, where the maximum is measured, the best one.
2. Report, on other images: the plain model at every limit, and zooming with the split chosen for that limit. Receipts
   are few, so both halves of them are used: each is reported with the choices made on the other one.
3. Times: the chosen pairs, question by question in turn, each asked alone.

All answers are stored; the same command resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.choices import GATES, best_split, gated, splits_of
from benchmarks.evidence import (
    CALIBRATION_SEED,
    CAPS,
    KINDS,
    Clock,
    Line,
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
from benchmarks.ladder_figures import point_of, task_figures, write_ladder
from benchmarks.ladder_time import PAIRS, read_times, time_works
from benchmarks.plan import print_plan
from qzoom.errors import HeadsMissingError, QZoomError

if TYPE_CHECKING:
    from qzoom.data.samples import Task
    from qzoom.evaluation.report_figures import Run
    from qzoom.model import QZoom

COARSE = (32, 48, 64, 100, 144, 196, 256)
REGION = (32, 64, 96, 144, 196, 288, 400)
TOLERANCE = 0.005


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("--caps", type=int, nargs="+", default=list(CAPS), help="visual-token limits to compare")
    made.add_argument(
        "--coarse", type=int, nargs="+", default=list(COARSE), help="token limits of the coarse view to try"
    )
    made.add_argument("--region", type=int, nargs="+", default=list(REGION), help="token limits of the regions to try")
    add_counts(made, 2000, 400)
    made.add_argument("--time", action="store_true", help="measure times; requires the finished answers")
    made.add_argument(
        "--time-questions",
        type=int,
        default=150,
        help="questions timed for the equal-accuracy pair; a third of them at each limit",
    )
    made.add_argument("--time-batch", type=int, default=8, help="batch size of the timed batches")
    return checked(made.parse_args(arguments))


def tasks(given: argparse.Namespace, part: str, kinds: Sequence[str] = ()) -> list[Task]:
    """The questions of "calibration" or "report", of the wanted kinds unless some are named; receipts are in both."""
    wanted = kinds or given.kinds
    if part == "report":
        return tasks_of(wanted, given.questions, given.data, 0, given.limit)
    return tasks_of(wanted, given.calibration_questions, given.data, CALIBRATION_SEED, given.limit)


def place(root: Path, part: str, task: Task, look: Look) -> Path:
    """File of a run's answers."""
    folder = "receipts" if task.name == "receipts" else part
    return root / "ladder" / folder / f"{task.name}-{look.name}.jsonl"


def first_works(given: argparse.Namespace, root: Path) -> Iterator[Work]:
    """All that needs no choice: the grid of splits, and the plain model."""
    for task in tasks(given, "calibration"):
        looks = [Look(coarse) for coarse in given.coarse]
        looks += [Look(c, r, 0.0) for c, r in splits_of(given.caps, given.coarse, given.region)]
        for look in looks:
            yield Work(task, look, place(root, "calibration", task, look), "1 calibration", given.max_new_tokens)
    for task in tasks(given, "report"):
        for cap in given.caps:
            look = Look(cap)
            yield Work(task, look, place(root, "report", task, look), "2 plain ladder", given.max_new_tokens)


def chosen_works(given: argparse.Namespace, root: Path) -> Iterator[Work]:
    """The zooming model on the reported pictures, each chosen split once."""
    for task in tasks(given, "report"):
        if task.name == "receipts":
            continue  # all of its splits have been asked
        seen = dict.fromkeys(look for look in choices(given, root, task.name).values() if look is not None)
        for look in seen:
            yield Work(task, look, place(root, "report", task, look), "3 zoom at every cap", given.max_new_tokens)


def choices(
    given: argparse.Namespace, root: Path, kind: str, pictures: frozenset[str] | None = None
) -> dict[int, Look | None]:
    """The split and gate for every cap, from the calibration answers; None where no split fits.

    Args:
        given: the options.
        root: of the kept answers.
        kind: of pictures.
        pictures: those that choose; None for all.
    """
    (task,) = tasks(given, "calibration", [kind])
    points = []
    for c, r in splits_of(given.caps, given.coarse, given.region):
        plain = kept_run(place(root, "calibration", task, Look(c)), task)
        zoomed = kept_run(place(root, "calibration", task, Look(c, r, 0.0)), task)
        if plain is None or zoomed is None:
            continue
        some = [[row for row in run.rows if pictures is None or row.picture in pictures] for run in (plain, zoomed)]
        scored = any(row.gate is not None and row.gate.score is not None for row in some[1])
        for threshold in GATES if scored else (0.0,):
            points.append(point_of(Look(c, r, threshold), gated(some[0], some[1], threshold), zoomed))
    largest = max(given.caps)
    found = {cap: best_split(points, cap, TOLERANCE if cap < largest else 0.0) for cap in given.caps}
    return {cap: None if p is None else Look(p.coarse, p.region, p.gate) for cap, p in found.items()}


def plain_lines(given: argparse.Namespace, root: Path, task: Task) -> dict[int, Line]:
    """The plain model at the caps that are finished."""
    out = {}
    for cap in given.caps:
        run = kept_run(place(root, "report", task, Look(cap)), task)
        if run is not None:
            out[cap] = Line(run.rows, run, {row.picture: Look(cap) for row in run.rows})
    return out


def zoom_lines(given: argparse.Namespace, root: Path, task: Task) -> dict[int, Line]:
    """The zooming model at the caps whose choice is finished."""
    if task.name == "receipts":
        return _crossed(given, root, task)
    out = {}
    for cap, look in choices(given, root, task.name).items():
        run = None if look is None else kept_run(place(root, "report", task, look), task)
        if look is not None and run is not None:
            out[cap] = Line(run.rows, run, {row.picture: look for row in run.rows})
    return out


def _crossed(given: argparse.Namespace, root: Path, task: Task) -> dict[int, Line]:
    """Each half of the pictures with what the other half chose, from answers that are there."""
    halves = [frozenset(task.ids[i::2]) for i in (0, 1)]
    found = [choices(given, root, task.name, half) for half in halves if half]
    out = {}
    for cap in given.caps:
        looks = {}
        for half, other in zip(halves, reversed(found), strict=False):
            if other[cap] is not None:
                looks |= dict.fromkeys(half, other[cap])
        if len(looks) != len(task.ids):
            continue
        runs = {look: _gated_run(root, task, look) for look in set(looks.values())}
        if any(run is None for run in runs.values()):
            continue
        rows = {look: rows for look, (rows, _) in runs.items()}
        taken = [row for picture in task.ids for row in rows[looks[picture]] if row.picture == picture]
        out[cap] = Line(tuple(taken), next(iter(runs.values()))[1], looks)
    return out


def _gated_run(root: Path, task: Task, look: Look) -> tuple[list, Run] | None:
    plain = kept_run(place(root, "calibration", task, Look(look.coarse)), task)
    zoomed = kept_run(place(root, "calibration", task, Look(look.coarse, look.region, 0.0)), task)
    if plain is None or zoomed is None:
        return None
    return gated(plain.rows, zoomed.rows, look.gate or 0.0), zoomed


def report(given: argparse.Namespace, root: Path, ran: dict) -> dict:
    """Write what there is so far, of all kinds; returns the figures."""
    found = {}
    for task in tasks(given, "report", KINDS):
        plain, zoom = plain_lines(given, root, task), zoom_lines(given, root, task)
        if plain:
            figures = task_figures(task, plain, zoom, given.caps)
            works = time_works(task, plain, zoom, figures, folder=root / "ladder" / "times", given=given)
            found[task.name] = figures | {"times": read_times(works, ran["weights"])}
    return write_ladder(given.results, found, ran, given.limit)


def times(given: argparse.Namespace, root: Path) -> list:
    """The pairs to time: the one of equal accuracy, alone and in batches, and the chosen split at every cap."""
    out = []
    for task in tasks(given, "report"):
        lines = plain_lines(given, root, task), zoom_lines(given, root, task)
        if set(lines[0]) != set(given.caps) or not lines[1]:
            raise QZoomError(f"The answers about {task.name} are not finished; run this without --time first.")
        figures = task_figures(task, *lines, given.caps)
        out += time_works(task, *lines, figures, folder=root / "ladder" / "times", given=given)
    return sorted(out, key=lambda work: work.name not in PAIRS)


def every(given: argparse.Namespace, root: Path, model: QZoom, clock: Clock) -> None:
    """Ask all that is not kept yet."""
    for works in (first_works(given, root), chosen_works(given, root)):
        for work in works:
            ask(model, work, clock, progress)


def planned(given: argparse.Namespace, root: Path) -> Iterable[Work]:
    """All works, those of the third part as if each cap had a split of its own."""
    yield from first_works(given, root)
    for task in tasks(given, "report"):
        if task.name != "receipts":
            for cap in given.caps:
                look = Look(cap // 2, cap - cap // 2, 0.0)
                yield Work(
                    task,
                    look,
                    root / "ladder" / "none" / f"{task.name}-{cap}.jsonl",
                    "3 zoom at every cap (at most)",
                    given.max_new_tokens,
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when all is done, 3 when the time was over first."""
    given = parse(arguments)
    model, digest = load(given.model, given.device)
    if not model.has_region:
        raise HeadsMissingError(f"{given.model} has no region branch, so there is no zooming to measure.")
    root, clock = given.runs / digest, Clock(given.minutes)
    if given.dry_run:
        print_plan(
            model, planned(given, root), times=len(given.kinds) * given.time_questions * (6 + len(given.caps)) // 3
        )
        return 0
    try:
        if given.time:
            for work in times(given, root):
                work.run(model, clock, progress)
        else:
            every(given, root, model, clock)
        done = True
    except OutOfTimeError:
        done = False
    report(given, root, about(model))
    return finished(given, "ladder", done=done)


if __name__ == "__main__":
    run_main(main)
