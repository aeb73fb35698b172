"""How long the evidence would take: a few questions of each kind, then arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from benchmarks.evidence import Look, Work, options_of, table

if TYPE_CHECKING:
    from qzoom.evaluation.records import Task
    from qzoom.model import QZoom

PROBES = (Look(64), Look(576), Look(64, 64, 0.0), Look(196, 288, 0.0))


def seconds_of(model: QZoom, task: Task, longest: int = 128) -> dict[bool, tuple[float, float]]:
    """Seconds per picture as (fixed, per token of the cap), plain under False and zooming under True.

    All questions about the first picture are asked in four ways; two points make a line.
    """
    from qzoom.evaluation.asking import ask_sample

    sample = task.sample(0)
    took: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for look in PROBES:
        rows = ask_sample(model, sample, options_of(model, look, longest))
        took[bool(look.region)].append((look.cap, sum(row.seconds for row in rows)))
    out = {}
    for zooms, ((low, first), (high, second)) in took.items():
        slope = max(0.0, (second - first) / (high - low))
        out[zooms] = (max(0.0, first - slope * low), slope)
    return out


def minutes_of(works: Iterable[Work], cost: dict[str, dict[bool, tuple[float, float]]]) -> dict[tuple[str, str], list]:
    """For each part and task: runs, pictures left, minutes."""
    out: dict[tuple[str, str], list] = {}
    for work in works:
        entry = out.setdefault((work.part, work.task.name), [0, 0, 0.0])
        fixed, slope = cost[work.task.name][bool(work.look.region)]
        left = work.left()
        entry[0] += 1
        entry[1] += left
        entry[2] += left * (fixed + slope * work.look.cap) / 60
    return out


def print_plan(model: QZoom, works: Iterable[Work], times: int = 0) -> None:
    """Print runs, pictures left and minutes of each part.

    Args:
        model: the model under test.
        works: what would be asked.
        times: pairs of questions that would be timed.
    """
    every = list({work.path: work for work in works}.values())
    cost = {
        task.name: seconds_of(model, task, every[0].longest) for task in {w.task.name: w.task for w in every}.values()
    }
    found = minutes_of(every, cost)
    rows = [["part", "pictures of", "runs", "pictures left", "minutes"]]
    rows += [[part, kind, str(runs), str(left), f"{took:.0f}"] for (part, kind), (runs, left, took) in found.items()]
    print(table(rows))
    total = sum(took for _, _, took in found.values())
    print(f"Together about {total:.0f} minutes on this machine as busy as it is now, in one process.")
    if times:
        print(f"Then about {times} pairs of questions are timed (--time), a few minutes on a quiet machine.")
