"""`qzoom train regions`, `qzoom train answers` and `qzoom train gate`: the stages, each from records to a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.training.loop import StepFacts
    from qzoom.training.stages import StageRecipe

__all__ = ["add_stages"]

Recipe = Annotated[Path, typer.Option(help="YAML recipe of this stage.")]
Base = Annotated[str | None, typer.Option(help="The model to train, instead of the recipe's.", show_default=False)]
Labels = Annotated[
    list[str] | None,
    typer.Option(help="Folder of records, instead of the recipe's; may be repeated.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default=False, help="Folder of the run; the model is in its `model`."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an earlier run in the output folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Refit = Annotated[bool, typer.Option("--refit", help="Stage 2.5: go on with the model's own region branch.")]


def add_stages(app: typer.Typer) -> None:
    """Put the three commands into the group `train`."""
    app.command("regions")(regions)
    app.command("answers")(answers)
    app.command("gate")(gate)


def regions(
    recipe: Recipe,
    output: Output = None,
    base: Base = None,
    labels: Labels = None,
    refit: Refit = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Train the region branch on labels of `qzoom label regions` (stage 1; with --refit stage 2.5).

    Example: qzoom train regions --recipe recipes/tiny/regions.yaml -o runs/regions
    """
    _train("regions", recipe, output, base, labels, refit, fresh, dry_run, json, quiet, device)


def answers(
    recipe: Recipe,
    output: Output = None,
    base: Base = None,
    labels: Labels = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Train the decoder to answer from coarse look and region together, on records of `qzoom mine` (stage 2).

    Example: qzoom train answers --recipe recipes/tiny/answers.yaml -o runs/answers
    """
    _train("answers", recipe, output, base, labels, False, fresh, dry_run, json, quiet, device)


def gate(
    recipe: Recipe,
    output: Output = None,
    base: Base = None,
    labels: Labels = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Train the gate on ladders of `qzoom label gate` (stage 3).

    Example: qzoom train gate --recipe recipes/tiny/gate.yaml -o runs/gate
    """
    _train("gate", recipe, output, base, labels, False, fresh, dry_run, json, quiet, device)


def _train(
    stage: str,
    path: Path,
    output: Path | None,
    base: str | None,
    labels: list[str] | None,
    refit: bool,
    fresh: bool,
    dry_run: bool,
    json: bool,
    quiet: bool,
    device: str,
) -> None:
    import torch

    from qzoom.training.stages import load_stage_recipe

    changes: dict[str, Any] = {}
    if base is not None:
        changes["base"] = base
    if labels:
        changes["labels"] = list(labels)
    recipe = load_stage_recipe(path, stage, changes)
    console = Console(quiet=quiet)
    console.hush_libraries()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dry_run:
        _plan(recipe, refit, console, json)
        return
    folder = output or (Path(recipe.output) if recipe.output else None)
    if folder is None:
        raise typer.BadParameter("name a folder with --output, or as `output` in the recipe.")
    _run(recipe, folder, refit, fresh, device, console, json)


def _plan(recipe: StageRecipe, refit: bool, console: Console, json: bool) -> None:
    """What would be done; labels that are not there yet are no mistake."""
    import os
    from dataclasses import asdict

    from qzoom.checkpoints.load import load_engine
    from qzoom.errors import QZoomError
    from qzoom.training.plan import find_sizes, make_plan
    from qzoom.training.stages import trained_stage
    from qzoom.training.train_stage import make_task

    samples = None
    there = Path(recipe.base).expanduser().is_dir() or not recipe.original
    missing = [name for name in recipe.labels if not Path(name).expanduser().is_dir()]
    if not missing and there:
        try:
            samples = len(make_task(recipe, load_engine(recipe.base)).weights)
        except QZoomError as error:
            console.note(f"samples are not counted: {error}")
    plan = make_plan(
        recipe,
        trained_stage(recipe, refit),
        find_sizes(recipe.base if there else recipe.original),
        samples,
        int(os.environ.get("WORLD_SIZE", "1")),
    )
    if json:
        console.record(asdict(plan))
        return
    parts = ", ".join(f"{part} {count:,}" for part, count in plan.trained.items())
    console.result(f"stage       {plan.stage} of {recipe.base} ({plan.base_weights:,} weights)")
    console.result(f"trained     {plan.trained_weights:,} weights: {parts}")
    console.result(f"memory      {plan.memory_gb:.1f} GB a process, activations aside")
    if missing:
        console.result(f"labels      not there yet: {', '.join(missing)}")
    count = "unknown" if plan.samples is None else f"{plan.samples:,}"
    steps = "unknown" if plan.steps is None else f"{plan.steps:,}"
    console.result(f"plan        {count} samples, {steps} steps of {recipe.batch} ({plan.parts} parts a process)")
    console.result(f"optimiser   AdamW, learning rate {recipe.learning_rate:g}, {recipe.precision}")


def _run(
    recipe: StageRecipe, folder: Path, refit: bool, fresh: bool, device: str, console: Console, json: bool
) -> None:
    import os
    from dataclasses import asdict

    from qzoom.training.train_stage import train_stage

    with _bar(console) as on_step:
        report = train_stage(recipe, folder, refit=refit, device=device, fresh=fresh, on_step=on_step)
    if int(os.environ.get("RANK", "0")):
        return
    if json:
        console.record(asdict(report))
        return
    loss = (
        "nothing was left to do"
        if report.last_loss is None
        else f"loss {report.first_loss:.4f} to {report.last_loss:.4f}"
    )
    console.result(f"{report.steps} steps on {report.samples} samples, {loss}; the model is in {report.model}")


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[StepFacts], None]]:
    """Loss, samples a second and time left: a bar where a person watches, else a line now and then."""
    import time

    if console.quiet:
        yield lambda _: None
        return
    if sys.stderr is not None and sys.stderr.isatty():
        import rich.console
        from rich.progress import MofNCompleteColumn, Progress

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
        with Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            line = bar.add_task("training", total=None)
            yield lambda f: bar.update(line, completed=f.step, total=f.steps, description=_line(f))
        return
    said = [0.0]

    def say(facts: StepFacts) -> None:
        if time.monotonic() - said[0] > 30 or facts.step == facts.steps:
            said[0] = time.monotonic()
            console.note(f"step {facts.step} of {facts.steps}: {_line(facts)}")

    yield say


def _line(facts: StepFacts) -> str:
    minutes, seconds = divmod(int(facts.left_s), 60)
    return f"loss {facts.loss:.4f}, {facts.samples_per_s:.1f} samples/s, {minutes}:{seconds:02d} left"
