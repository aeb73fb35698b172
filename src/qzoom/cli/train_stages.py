"""`qzoom train regions|answers|gate` (the stages, each from records to a model) and `qzoom train student`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.training.plan import Plan
    from qzoom.training.run import StepMetrics
    from qzoom.training.stages import StageRecipe
    from qzoom.training.student.recipe import StudentRecipe
    from qzoom.training.student.validate import Validation

__all__ = ["answers", "gate", "regions", "student"]

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
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard an earlier run in the output folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
Refit = Annotated[bool, typer.Option("--refit", help="Stage 2.5: train the model's own region branch further.")]


def regions(
    *,
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
    settings = _stage_recipe("regions", recipe, base, labels)
    console = _console(quiet=quiet)
    if dry_run:
        _plan_stage(settings, console, refit=refit, json=json)
    else:
        _run_stage(settings, _folder(output, settings.output), device, console, refit=refit, fresh=fresh, json=json)


def answers(
    *,
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
    """Train the decoder to answer from the coarse pass and the region, on `qzoom label hard-cases` (stage 2).

    Example: qzoom train answers --recipe recipes/tiny/answers.yaml -o runs/answers
    """
    settings = _stage_recipe("answers", recipe, base, labels)
    console = _console(quiet=quiet)
    if dry_run:
        _plan_stage(settings, console, json=json)
    else:
        _run_stage(settings, _folder(output, settings.output), device, console, fresh=fresh, json=json)


def gate(
    *,
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
    """Train the gate on records of `qzoom label gate` (stage 3).

    Example: qzoom train gate --recipe recipes/tiny/gate.yaml -o runs/gate
    """
    settings = _stage_recipe("gate", recipe, base, labels)
    console = _console(quiet=quiet)
    if dry_run:
        _plan_stage(settings, console, json=json)
    else:
        _run_stage(settings, _folder(output, settings.output), device, console, fresh=fresh, json=json)


def student(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/tiny/student.yaml.", show_default=False)],
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that `qzoom distill` exported to, instead of the recipe's.", show_default=False),
    ] = None,
    method: Annotated[
        Literal["sft", "grpo", "sft+grpo"] | None,
        typer.Option(help="What to run, instead of the recipe's.", show_default=False),
    ] = None,
    base: Base = None,
    output: Output = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    device: options.Device = "auto",
) -> None:
    """Train a student on distilled questions: supervised, reinforced, or one after the other.

    Example: qzoom train student recipes/tiny/student.yaml --data distilled/dataset -o runs/distilled
    """
    from qzoom.training.student.recipe import load_student_recipe

    changes = {"data": data, "method": method, "base": base}
    settings = load_student_recipe(recipe, {name: str(value) for name, value in changes.items() if value is not None})
    console = _console(quiet=quiet)
    if dry_run:
        _plan_student(settings, console, json=json)
    else:
        _run_student(settings, _folder(output, settings.output), device, console, fresh=fresh, json=json)


def _console(*, quiet: bool) -> Console:
    """The console of the main process; the others are quiet."""
    console = Console(quiet=quiet or not _is_main())
    console.hush_libraries()
    return console


def _is_main() -> bool:
    import os

    return not int(os.environ.get("RANK", "0"))


def _folder(output: Path | None, of_recipe: str) -> Path:
    if output is None and not of_recipe:
        raise typer.BadParameter("name a folder with --output, or as `output` in the recipe.")
    return output or Path(of_recipe)


def _device(device: str) -> str:
    from qzoom.checkpoints.base import choose_device

    return str(choose_device(device))


def _stage_recipe(stage: str, path: Path, base: str | None, labels: list[str] | None) -> StageRecipe:
    from qzoom.training.stages import load_stage_recipe

    changes: dict[str, Any] = {"base": base, "labels": list(labels or ()) or None}
    return load_stage_recipe(path, stage, {name: value for name, value in changes.items() if value is not None})


def _plan_stage(recipe: StageRecipe, console: Console, *, refit: bool = False, json: bool) -> None:
    """What would be done; labels that do not exist yet are no mistake."""
    import os

    from qzoom.checkpoints.load import load_engine
    from qzoom.errors import QZoomError
    from qzoom.training.plan import find_sizes, plan_stage
    from qzoom.training.stages import trained_stage
    from qzoom.training.train_stage import make_task

    samples = None
    exists = Path(recipe.base).expanduser().is_dir() or not recipe.original
    missing = [name for name in recipe.labels if not Path(name).expanduser().is_dir()]
    if not missing and exists:
        try:
            samples = len(make_task(recipe, load_engine(recipe.base)).weights)
        except QZoomError as error:
            console.note(f"samples are not counted: {error}")
    stage = trained_stage(recipe, refit=refit)
    sizes = find_sizes(recipe.base if exists else recipe.original)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_stage(recipe, stage, sizes, samples, processes=processes)
    if json:
        _record(plan, console)
        return
    console.result(f"stage       {stage} of {recipe.base} ({plan.base_weights:,} weights)")
    _weights(plan, console)
    if missing:
        console.result(f"labels      not there yet: {', '.join(missing)}")
    (phase,) = plan.phases
    count = "unknown" if plan.samples is None else f"{plan.samples:,}"
    steps = "unknown" if phase.steps is None else f"{phase.steps:,}"
    console.result(f"plan        {count} samples, {steps} steps of {phase.batch} ({phase.forwards} forwards a process)")
    console.result(f"optimiser   AdamW, learning rate {recipe.learning_rate:g}, {recipe.precision}")


def _plan_student(recipe: StudentRecipe, console: Console, *, json: bool) -> None:
    from qzoom.training.plan import plan_student

    plan = plan_student(recipe)
    if json:
        _record(plan, console)
        return
    console.result(f"student     {recipe.base} ({plan.base_weights:,} weights), {recipe.method}")
    _weights(plan, console)
    if plan.samples is None:
        console.result(f"data        not there yet: {recipe.data or 'name it with --data'}")
    else:
        console.result(
            f"data        {plan.samples:,} questions about {plan.images:,} images ({plan.negatives:,} about absent "
            f"things), {plan.held_out:,} held out"
        )
    for phase in plan.phases:
        steps = "unknown" if phase.steps is None else f"{phase.steps:,}"
        console.result(
            f"{phase.phase:<11} {steps} steps of {phase.batch} {phase.unit}, {phase.forwards} forwards a step, "
            f"learning rate {phase.learning_rate:g}"
        )


def _record(plan: Plan, console: Console) -> None:
    from dataclasses import asdict

    console.record(asdict(plan))


def _weights(plan: Plan, console: Console) -> None:
    parts = ", ".join(f"{part} {count:,}" for part, count in plan.trained.items())
    console.result(f"trained     {plan.trained_weights:,} weights: {parts}")
    console.result(f"memory      {plan.memory_gb:.1f} GB a process, activations aside")


def _run_stage(
    recipe: StageRecipe,
    folder: Path,
    device: str,
    console: Console,
    *,
    refit: bool = False,
    fresh: bool,
    json: bool,
) -> None:
    from dataclasses import asdict

    from qzoom.training.train_stage import train_stage

    with _bar(console) as on_step:
        report = train_stage(recipe, folder, refit=refit, device=_device(device), fresh=fresh, on_step=on_step)
    if not _is_main():
        return
    _warn_few(report.samples, "samples", console)
    if json:
        console.record(asdict(report))
        return
    losses = _losses(report.start, report.steps, report.first_loss, report.last_loss)
    console.result(f"{report.steps} steps on {report.samples} samples, {losses}; the model is in {report.model}")


def _run_student(
    recipe: StudentRecipe, folder: Path, device: str, console: Console, *, fresh: bool, json: bool
) -> None:
    from dataclasses import asdict

    from qzoom.training.student.run import train_student

    with _bar(console) as on_step:
        report = train_student(
            recipe,
            folder,
            device=_device(device),
            fresh=fresh,
            on_phase=lambda phase, steps: console.note(f"{phase}: {steps} steps"),
            on_step=on_step,
            on_validation=lambda validation: console.note(_validation(validation)),
        )
    if not _is_main():
        return
    _warn_few(report.questions, "questions", console)
    if json:
        console.record(asdict(report))
        return
    for phase in report.phases:
        losses = _losses(phase.start, phase.steps, phase.first_loss, phase.last_loss)
        kept = "" if phase.best_step is None else f", weights of step {phase.best_step} kept"
        console.result(f"{phase.phase}: {phase.steps} steps, {losses}{kept}")
    console.result(
        f"{report.questions} questions, {report.negatives} of them about absent things; model in {report.model}"
    )


def _losses(start: int, steps: int, first: float | None, last: float | None) -> str:
    figures = "no loss" if first is None or last is None else f"loss {first:.4f} to {last:.4f}"
    return figures + (" (nothing was left to do)" if start == steps else "")


def _warn_few(count: int, unit: str, console: Console) -> None:
    from qzoom.training.run import FEW_SAMPLES

    if count < FEW_SAMPLES:
        console.note(f"warning: trained on {count} {unit}; so few say nothing about the method. Label or export more.")


def _validation(found: Validation) -> str:
    negative = "" if found.exact_negative is None else f", {found.exact_negative:.1%} of {found.n_negative} negatives"
    return f"step {found.step}: {found.exact:.1%} of {found.n} held-out questions right{negative}"


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[StepMetrics], None]]:
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
    printed = [0.0]

    def write(metrics: StepMetrics) -> None:
        if time.monotonic() - printed[0] > 30 or metrics.step == metrics.steps:
            printed[0] = time.monotonic()
            console.note(f"step {metrics.step} of {metrics.steps}: {_line(metrics)}")

    yield write


def _line(metrics: StepMetrics) -> str:
    minutes, seconds = divmod(int(metrics.left_s), 60)
    return f"loss {metrics.loss:.4f}, {metrics.samples_per_s:.1f} samples/s, {minutes}:{seconds:02d} left"
