"""`qzoom train`: make models from recipes. The embedded model is made by `python tiny/train.py` instead."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(help="Train models from recipes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train models from recipes."""
