"""`qzoom convert`: from one kind of checkpoint to another, and published label files to records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

__all__ = ["convert"]


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help='A model folder, a model id on the hub, or the word "labels".')
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="The folder to write: new, empty, or a checkpoint to replace. Or a pickle."),
    ],
    answer_only: Annotated[
        bool, typer.Option("--answer-only", help="Leave gate and region branch out, so that other engines load it.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", show_default=False, help="labels: folder for the records.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(show_default=False, help="labels: folder that the picture paths start from.")
    ] = None,
    made_with: Annotated[str, typer.Option(metavar="MODEL", help="labels: the model they were made with.")] = "unknown",
    fresh: Annotated[bool, typer.Option("--fresh", help="labels: start --output anew.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn the authors' merged checkpoint into our adapter, or the other way round.

    With --answer-only either becomes a plain model of its family.

    With the word labels, a published label file (a pickle) becomes records; nothing that it holds is run.

    Example: qzoom convert path/to/merged path/to/adapter

    Example: qzoom convert labels stage1.pkl --images pictures --output labels/published
    """
    console = Console(quiet=quiet)
    if source == "labels":
        _labels(target, output, images, made_with, fresh, console)
        return
    for flag, given in (("--output", output), ("--images", images), ("--fresh", fresh or None)):
        if given is not None:
            raise typer.BadParameter(f"{flag} is for `qzoom convert labels PICKLE` only.")
    from qzoom.checkpoints.convert import convert as run

    console.hush_libraries()
    report = run(source, target, answer_only=answer_only)
    kinds = f"{report.read_kind} to {report.written_kind}"
    console.note(f"saved   {report.target}: {kinds}, {report.tensors} tensors, {report.size_bytes / 1e6:.1f} MB")
    for note in report.notes:
        console.note(f"note    {note}")


def _labels(
    pickle: Path, output: Path | None, images: Path | None, made_with: str, fresh: bool, console: Console
) -> None:
    from qzoom.labels.published import convert_published

    if output is None:
        raise typer.BadParameter("name the folder for the records with --output.")
    report = convert_published(pickle, output, images or pickle.parent, model=made_with, fresh=fresh)
    console.note(f"saved   {output}: {report.usable} usable label maps of {report.entries} entries")
    if report.skipped:
        console.note(f"note    {report.skipped} entries skipped; the first: {report.reasons[0]}")
