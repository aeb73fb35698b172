"""`qzoom report`: curves, tables and failures of many evaluations, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

__all__ = ["report"]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Answer files of `qzoom eval`, or folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for page, charts, Markdown and figures.")],
    data: Annotated[
        Path | None, typer.Option(show_default=False, help="Folder of the receipts, to show them in the gallery.")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "What zooming buys",
    failures: Annotated[int, typer.Option(min=0, max=50, help="Most failures of a kind in the gallery.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws behind the intervals.")] = 0,
    page: Annotated[Path | None, typer.Option(show_default=False, help="Also write the Markdown to this file.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare evaluations: accuracy against seconds, visual tokens and FLOPs, differences by pairs, failures.

    Runs over the same questions are compared with each other. report.html needs nothing else and opens anywhere.

    Example: qzoom report runs/final -o out/report
    """
    from qzoom.evaluation.report import findings, write_report

    console = Console(quiet=quiet)
    tasks = write_report(runs, output, title=title, data=data, failures_each=failures, seed=seed, page=page)
    if json:
        console.record({"tasks": [task.to_dict() for task in tasks]})
    else:
        for task in tasks:
            console.result(f"{task.name}: {len(task.runs)} runs, {task.questions} questions")
            for sentence in findings(task):
                console.result(f"  {sentence}")
    console.note(f"saved   {output / 'report.html'}")
