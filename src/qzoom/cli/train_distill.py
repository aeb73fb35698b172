"""`qzoom train distill`: teach a model to see from the whole picture what teachers found on crops."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.training.student.recipe import DistillRecipe
    from qzoom.training.student.validate import Validation

__all__ = ["distill"]

Method = Literal["sft", "grpo", "sft+grpo"]


def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/tiny/distill.yaml.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that `qzoom distill` exported to, instead of the recipe's.", show_default=False),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="What to run, instead of the recipe's.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model to train, instead of the recipe's.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default=False, help="Folder of the run; the model is in its `model`."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Train on distilled questions: supervised, reinforced, or the one after the other.

    Example: qzoom train distill recipes/tiny/distill.yaml --data distilled/dataset -o runs/distilled
    """
    from qzoom.training.student.recipe import load_distill_recipe

    given = {"data": data, "method": method, "base": base}
    changes = {name: str(value) for name, value in given.items() if value is not None}
    settings = load_distill_recipe(recipe, changes)
    console = Console(quiet=quiet)
    console.hush_libraries()
    if dry_run:
        _plan(settings, console, json)
        return
    folder = output or (Path(settings.output) if settings.output else None)
    if folder is None:
        raise typer.BadParameter("name a folder with --output, or as `output` in the recipe.")
    _run(settings, folder, fresh, device, console, json)


def _plan(recipe: DistillRecipe, console: Console, json: bool) -> None:
    from dataclasses import asdict

    from qzoom.training.student.plan import make_plan

    plan = make_plan(recipe)
    if json:
        console.record(asdict(plan))
        return
    console.result(f"student     {recipe.base} ({plan.base_weights:,} weights), {recipe.method}")
    console.result(f"trained     {plan.trained_weights:,} weights, vision tower {'in' if recipe.vision else 'not in'}")
    console.result(f"memory      {plan.memory_gb:.1f} GB a process, activations aside")
    if plan.questions is None:
        console.result(f"data        not there yet: {recipe.data or 'name it with --data'}")
    else:
        console.result(
            f"data        {plan.questions:,} questions about {plan.pictures:,} pictures ({plan.negatives:,} about "
            f"absent things), {plan.held_out:,} held out"
        )
    for part in plan.parts:
        steps = "unknown" if part.steps is None else f"{part.steps:,}"
        console.result(
            f"{part.part:<11} {steps} steps of {part.batch} {part.unit}, {part.forwards} forwards a step, "
            f"learning rate {part.learning_rate:g}"
        )


def _run(recipe: DistillRecipe, folder: Path, fresh: bool, device: str, console: Console, json: bool) -> None:
    import os
    from dataclasses import asdict

    import torch

    from qzoom.cli.train_stages import _bar
    from qzoom.training.student.run import train_distill

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    first = not int(os.environ.get("RANK", "0"))
    console = console if first else Console(quiet=True)

    def on_part(part: str, steps: int) -> None:
        console.note(f"{part}: {steps} steps")

    def on_validation(found: Validation) -> None:
        console.note(_figures(found))

    with _bar(console) if not console.quiet else nullcontext(lambda _: None) as on_step:
        report = train_distill(
            recipe,
            folder,
            device=device,
            fresh=fresh,
            on_part=on_part,
            on_step=on_step,
            on_validation=on_validation,
        )
    if not first:
        return
    if json:
        record: dict[str, Any] = asdict(report)
        console.record(record)
        return
    for part in report.parts:
        loss = "was done" if part.first_loss is None else f"loss {part.first_loss:.4f} to {part.last_loss:.4f}"
        kept = "" if part.best_step is None else f", weights of step {part.best_step} kept"
        console.result(f"{part.part}: {part.steps} steps, {loss}{kept}")
    console.result(
        f"{report.questions} questions, {report.negatives} of them about absent things; model in {report.model}"
    )


def _figures(found: Validation) -> str:
    negative = "" if found.exact_negative is None else f", {found.exact_negative:.1%} of {found.n_negative} negatives"
    return f"step {found.step}: {found.exact:.1%} of {found.n} held-out questions right{negative}"
