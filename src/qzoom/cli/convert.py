"""`qzoom convert`: from one kind of checkpoint to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

__all__ = ["convert"]


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder or a model id on the hub.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write: new, empty, or a checkpoint to replace.")
    ],
    answer_only: Annotated[
        bool, typer.Option("--answer-only", help="Leave gate and region branch out, so that other engines load it.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn the authors' merged checkpoint into our adapter, or the other way round.

    With --answer-only either becomes a plain model of its family.

    Example: qzoom convert path/to/merged path/to/adapter
    """
    from qzoom.checkpoints.convert import convert as run

    console = Console(quiet=quiet)
    console.hush_libraries()
    report = run(source, target, answer_only=answer_only)
    kinds = f"{report.read_kind} to {report.written_kind}"
    console.note(f"saved   {report.target}: {kinds}, {report.tensors} tensors, {report.size_bytes / 1e6:.1f} MB")
    for note in report.notes:
        console.note(f"note    {note}")
