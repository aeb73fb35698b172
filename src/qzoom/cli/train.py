"""`qzoom train`: make models from recipes. `base` trains the embedded base model from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Train models from recipes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train models from recipes."""


@app.command("base")
def base(
    recipe: Annotated[Path, typer.Option(help="YAML file that says what to train.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for checkpoints, the training curve and the model.")
    ] = Path("runs/tiny"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")] = False,
) -> None:
    """Train the embedded base model; a stopped run goes on where it was when the same command is given again."""
    from qzoom.errors import DeviceError
    from qzoom.training.base import train_base
    from qzoom.training.recipe import load_recipe

    if device not in ("cpu", "cuda"):
        raise DeviceError(f"--device {device} is not supported; use cpu or cuda.")
    model = train_base(load_recipe(recipe), output, device=device, fresh=fresh)
    typer.echo(f"The model is in {model}.")


@app.command("average")
def average(
    models: Annotated[list[Path], typer.Argument(help="Folders of models trained from the same start.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for their mean.")],
) -> None:
    """Write the mean of two or more models that went different ways from the same start."""
    from qzoom.training.average import average_models

    average_models(models, output)
    typer.echo(f"The mean of {len(models)} models is in {output}.")
