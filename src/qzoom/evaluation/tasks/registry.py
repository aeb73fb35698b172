"""Tasks by name, as the command line asks for them."""

from __future__ import annotations

import difflib
from pathlib import Path

from qzoom.errors import ConfigError
from qzoom.evaluation.records import Task
from qzoom.evaluation.tasks.receipts import read_receipts
from qzoom.evaluation.tasks.synthetic import SYNTHETIC_TASKS, open_synthetic

__all__ = ["TASK_NAMES", "open_task"]

TASK_NAMES = ("receipts", *SYNTHETIC_TASKS)


def open_task(name: str, *, data: Path | None = None, split: str = "dev", seed: int = 0, count: int = 100) -> Task:
    """The task of a name, checked and ready to be asked.

    Args:
        name: one of `TASK_NAMES`.
        data: folder of the question file ("receipts").
        split: the question file's name without its ending ("receipts").
        seed: number of the first held-out picture ("documents" and "scenes").
        count: how many pictures ("documents" and "scenes").

    Raises:
        ConfigError: an unknown name, or no folder.
        DataError: the data cannot be used.
    """
    if name in SYNTHETIC_TASKS:
        return open_synthetic(name, seed, count)
    if name != "receipts":
        close = difflib.get_close_matches(name, TASK_NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known tasks: {', '.join(TASK_NAMES)}."
        raise ConfigError(f"No task {name!r}; {hint}")
    if data is None:
        raise ConfigError("The task receipts reads a question file: name its folder with --data.")
    return read_receipts(data, split)
