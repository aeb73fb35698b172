"""Tasks by name, as the command line uses them."""

from __future__ import annotations

import difflib
from pathlib import Path

from qzoom.data.benchmarks.choice import HRBENCH_4K, HRBENCH_8K, MME_REALWORLD_LITE, VSTAR
from qzoom.data.benchmarks.table import open_table
from qzoom.data.benchmarks.vqa import CHARTQA, DOCVQA, INFOVQA, OCRBENCH, TEXTVQA
from qzoom.data.benchmarks.zoombench import ZOOMBENCH
from qzoom.data.drawn import SYNTHETIC_TASKS, open_synthetic
from qzoom.data.questions import RECEIPT_FIELDS, read_receipts
from qzoom.data.samples import Task
from qzoom.errors import ConfigError

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        TEXTVQA,
        INFOVQA,
        CHARTQA,
        OCRBENCH,
        DOCVQA,
        VSTAR,
        MME_REALWORLD_LITE,
        HRBENCH_4K,
        HRBENCH_8K,
        ZOOMBENCH,
    )
}
TASK_NAMES = ("receipts", *SYNTHETIC_TASKS, *BENCHMARKS)


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
    if name in SYNTHETIC_TASKS:
        return open_synthetic(name, seed, count)
    if name in BENCHMARKS:
        return open_table(BENCHMARKS[name], data=data, split=split, revision=revision)
    if name != "receipts":
        close = difflib.get_close_matches(name, TASK_NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known tasks: {', '.join(TASK_NAMES)}."
        raise ConfigError(f"No task {name!r}; {hint}")
    if data is None:
        raise ConfigError("The task receipts reads a question file: name its folder with --data.")
    own = data / name
    return read_receipts(own if own.is_dir() else data, split or "dev")


def fields_of(name: str) -> tuple[str, ...]:
    """Fields that always appear among a task's figures; none for a name that is no task's."""
    if name == "receipts":
        return RECEIPT_FIELDS
    return BENCHMARKS[name].fields if name in BENCHMARKS else ()
