"""Tasks by name, as the command line uses them.

Held-out synthetic images are drawn from seeds that no training run may use, with the fonts that every installation has,
so that a command asks the same questions everywhere. An answer box that covers the whole image is ignored, so that such
questions do not count in the hit rate.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from qzoom.data.benchmarks.rows import TABLES
from qzoom.data.benchmarks.table import open_table
from qzoom.data.benchmarks.zoombench import ZOOMBENCH
from qzoom.data.questions import DRAWN, RECEIPT_FIELDS, read_receipts, render_drawn, task_folder
from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.errors import ConfigError


def open_synthetic(name: str, first: int, count: int) -> Task:
    """Held-out pictures from number `first` on; more may be added to a run (ConfigError: numbers outside the held-out
    range)."""
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    room = len(HELD_OUT_SEEDS)
    if first < 0 or count < 1 or first + count > room:
        raise ConfigError(
            f"Held-out pictures are numbered 0 to {room - 1}; seed {first} with {count} pictures lies outside."
        )
    ids = tuple(f"{name}-{first + i}" for i in range(count))
    return Task(name, ids, {"task": name, "seed": first}, lambda number: _draw(name, first + number))


def _draw(name: str, number: int) -> Sample:
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    drawn = render_drawn(name, HELD_OUT_SEEDS[number], font_set="core", reword=False)
    whole = (0, 0, *drawn.image.size)
    questions = tuple(
        SampleQuestion(
            q.field,
            q.question,
            q.answer,
            tuple(box for box in q.boxes if box != whole),
            q.easy,
            negative=q.answer == "no" and not q.boxes,
        )
        for q in drawn.questions
    )
    return Sample(f"{name}-{number}", drawn.image, drawn.image.size, questions)


BENCHMARKS = {benchmark.name: benchmark for benchmark in (*TABLES, ZOOMBENCH)}
TASK_NAMES = ("receipts", *DRAWN, *BENCHMARKS)


def open_task(
    name: str,
    *,
    data: Path | None = None,
    split: str | None = None,
    seed: int = 0,
    count: int = 100,
    revision: str | None = None,
) -> Task:
    """The task of a name, checked and ready to be asked.

    Args:
        name: one of `TASK_NAMES`.
        data: folder of the question file ("receipts") or of a benchmark's table, which else comes from the hub.
        split: the question file's name without its ending ("receipts", else "dev"), or a benchmark's split.
        seed: number of the first held-out picture ("documents" and "scenes").
        count: how many pictures ("documents" and "scenes").
        revision: branch, tag or commit of a benchmark's dataset on the hub.

    Raises:
        ConfigError: an unknown name, or no folder.
        DataError: the data cannot be used.
    """
    if name in DRAWN:
        return open_synthetic(name, seed, count)
    if name in BENCHMARKS:
        return open_table(BENCHMARKS[name], data=data, split=split, revision=revision)
    if name != "receipts":
        close = difflib.get_close_matches(name, TASK_NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known tasks: {', '.join(TASK_NAMES)}."
        raise ConfigError(f"No task {name!r}; {hint}")
    if data is None:
        raise ConfigError("The task receipts reads a question file: name its folder with --data.")
    return read_receipts(task_folder(data, name), split or "dev")


def fields_of(name: str) -> tuple[str, ...]:
    """Fields that always appear among a task's figures; none for a name that is no task's."""
    if name == "receipts":
        return RECEIPT_FIELDS
    return BENCHMARKS[name].fields if name in BENCHMARKS else ()
