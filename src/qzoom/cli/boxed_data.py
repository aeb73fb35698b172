"""Data with boxes as the command line names it, for the measures that need to know where an answer is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qzoom.data.samples import Task

__all__ = ["QUESTIONS", "Data", "Source", "open_boxed"]

QUESTIONS = "questions"

Source = Annotated[
    str,
    typer.Argument(
        metavar="[TASK]",
        help="questions (any question file with boxes, also receipts), documents, scenes, or zoombench.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(show_default=False, help="questions: the folder of NAME.jsonl; zoombench: files instead of the hub."),
]


def open_boxed(
    name: str, data: Path | None, split: str | None, revision: str | None, seed: int | None, count: int | None
) -> Task:
    """The questions, checked.

    Args:
        name: as `Source` says.
        data: folder of files.
        split: which file, or which split of a benchmark.
        revision: of a benchmark's data on the hub.
        seed: number of the first drawn picture.
        count: how many drawn pictures.

    Raises:
        typer.BadParameter: a wrong call.
        DataError: data that cannot be used.
    """
    from qzoom.data.benchmarks.registry import open_task
    from qzoom.data.drawn import SYNTHETIC_TASKS
    from qzoom.data.questions import read_receipt_questions
    from qzoom.errors import ConfigError

    if name not in (QUESTIONS, "receipts", "zoombench", *SYNTHETIC_TASKS):
        raise typer.BadParameter(
            f"No task with boxes is called {name!r}; known: questions, documents, scenes, zoombench."
        )
    drawn = name in SYNTHETIC_TASKS
    useless: list[tuple[str, object]] = (
        [("--data", data), ("--split", split)] if drawn else [("--seed", seed), ("--count", count)]
    )
    if name != "zoombench":
        useless.append(("--data-revision", revision))
    for flag, value in useless:
        if value is not None:
            raise typer.BadParameter(f"{flag} has no meaning for the task {name}; leave it out.")
    if name in (QUESTIONS, "receipts"):
        if data is None:
            raise typer.BadParameter("name the folder that holds the question file with --data.")
        return read_receipt_questions(data, split or "dev")
    try:
        return open_task(name, data=data, split=split, revision=revision, seed=seed or 0, count=count or 100)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
