"""`qzoom train heads`: from a base model to an adapter that zooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["heads"]


def heads(
    recipe: Annotated[Path, typer.Option(help="YAML recipe, e.g. recipes/tiny/heads.yaml.")],
    output: Annotated[Path, typer.Option(help="Folder for labels and the adapter; a rerun continues from it.")],
    processes: Annotated[int, typer.Option(min=1, help="Labelling processes, one thread each.")] = 1,
    fresh: Annotated[bool, typer.Option(help="Start over instead of continuing.")] = False,
) -> None:
    """Label with the base model's own answers and train the gate and the region branch.

    The model (base, heads and their settings, in bfloat16) is written to OUTPUT/adapter, the figures to
    OUTPUT/report.json.
    """
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from qzoom.checkpoints.adapter import save_pretrained
    from qzoom.training.heads_recipe import load_heads_recipe
    from qzoom.training.heads_run import half_width, run_heads

    settings = load_heads_recipe(recipe)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=RichConsole(stderr=True)) as progress:
        real = settings.receipt_pictures if settings.receipts else 0
        pictures = settings.documents + settings.scenes + real
        pictures += settings.zoom_pictures if settings.gate_labels == "zoom" else settings.gate_pictures
        labelling = progress.add_task("labels", total=pictures)
        fits = {
            "region": progress.add_task("region", total=settings.steps),
            "gate": progress.add_task("gate", total=settings.gate_steps),
        }
        engine, report = run_heads(
            settings,
            output,
            processes=processes,
            fresh=fresh,
            on_label=lambda count: progress.advance(labelling, count),
            on_step=lambda branch, step, loss: progress.update(
                fits[branch], completed=step, description=f"{branch} loss {loss:.3f}"
            ),
        )
    save_pretrained(half_width(engine), output / "adapter", include_base=True)
    share = "unknown" if report.label_agreement is None else f"{report.label_agreement:.1%}"
    typer.echo(
        f"{report.region_examples} label maps (agreement with known boxes {share}), gate labels "
        f"{report.gate_examples}; model in {output / 'adapter'}"
    )
