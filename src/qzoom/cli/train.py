"""`qzoom train`: the stages regions, answers and gate, and the student, each from a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import flatten, optional
from qzoom.cli.options import Device, Fresh, OutputOptions, find_device
from qzoom.errors import QZoomError

if TYPE_CHECKING:
    from qzoom.training.plan import Plan
    from qzoom.training.run import StepMetrics
    from qzoom.training.stages import StageRecipe
    from qzoom.training.student.recipe import StudentRecipe
    from qzoom.training.student.validate import Validation


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is trained instead of the recipe's model, and where."""

    output: Annotated[
        Path | None, optional("Folder of the run; the model is written to its subfolder `model`.", "--output", "-o")
    ] = None
    base: Annotated[str | None, optional("Model to train; overrides the recipe.")] = None
    fresh: Fresh = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False
    device: Device = "auto"

    def folder(self, of_recipe: str) -> Path:
        """The folder of the run (typer.BadParameter: none is named)."""
        if self.output is None and not of_recipe:
            raise typer.BadParameter("name a folder with --output, or as `output` in the recipe.")
        folder = self.output or Path(of_recipe)
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(f"{folder} is a file; name a folder.", param_hint="--output")
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOptions(RunOptions):
    """The recipe of a stage, its data, and what is trained where."""

    recipe: Annotated[Path, typer.Option(help="YAML recipe of this stage.")]
    labels: Annotated[list[str] | None, optional("Folder of labels; overrides the recipe; may be repeated.")] = None


@flatten
def regions(
    *,
    stage: StageOptions,
    refit: Annotated[
        bool, typer.Option("--refit", help="Stage 2.5: continue training the model's own region branch.")
    ] = False,
    out: OutputOptions,
) -> None:
    """Train the region branch on labels of `qzoom label regions` (stage 1; with --refit stage 2.5).

    Example: qzoom train regions --recipe recipes/tiny/regions.yaml -o runs/regions
    """
    _train_stage("regions", stage, out, refit=refit)


@flatten
def answers(*, stage: StageOptions, out: OutputOptions) -> None:
    """Train the decoder to answer from the coarse pass and the region, on `qzoom label hard-cases` (stage 2).

    Example: qzoom train answers --recipe recipes/tiny/answers.yaml -o runs/answers
    """
    _train_stage("answers", stage, out)


@flatten
def gate(*, stage: StageOptions, out: OutputOptions) -> None:
    """Train the gate on records of `qzoom label gate` (stage 3).

    Example: qzoom train gate --recipe recipes/tiny/gate.yaml -o runs/gate
    """
    _train_stage("gate", stage, out)


@flatten
def student(
    *,
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/tiny/student.yaml.", show_default=False)],
    data: Annotated[Path | None, optional("Folder that `qzoom distill` exported to; overrides the recipe.")] = None,
    method: Annotated[
        Literal["sft", "grpo", "sft+grpo"] | None, optional("Phases to run; overrides the recipe.")
    ] = None,
    run: RunOptions,
    out: OutputOptions,
) -> None:
    """Train a student on distilled questions: supervised, by reinforcement learning, or both in turn.

    Example: qzoom train student recipes/tiny/student.yaml --data distilled/dataset -o runs/distilled
    """
    from qzoom.settings import read_settings
    from qzoom.training.student.recipe import StudentRecipe

    changes = {"data": data, "method": method, "base": run.base}
    settings = read_settings(
        StudentRecipe, recipe, changes={name: str(value) for name, value in changes.items() if value is not None}
    )
    console = _console(out)
    if run.dry_run:
        _plan_student(settings, console, json=out.json)
    else:
        _run_student(settings, run, console, json=out.json)


def _console(out: OutputOptions) -> Console:
    """The console of the main process; the others are quiet."""
    console = Console(quiet=out.quiet or not _is_main())
    console.hush_libraries()
    return console


def _is_main() -> bool:
    return not int(os.environ.get("RANK", "0"))


def _train_stage(name: str, stage: StageOptions, out: OutputOptions, *, refit: bool = False) -> None:
    from qzoom.training.stages import load_stage_recipe

    changes: dict[str, Any] = {"base": stage.base, "labels": list(stage.labels or ()) or None}
    given = {key: value for key, value in changes.items() if value is not None}
    recipe = load_stage_recipe(stage.recipe, name, given)
    console = _console(out)
    if stage.dry_run:
        _plan_stage(recipe, console, refit=refit, json=out.json)
    else:
        _run_stage(recipe, stage, console, refit=refit, json=out.json)


def _plan_stage(recipe: StageRecipe, console: Console, *, refit: bool, json: bool) -> None:
    """What would be done; labels that do not exist yet are no mistake."""
    from qzoom.checkpoints.load import load_engine
    from qzoom.training.plan import find_sizes, plan_stage
    from qzoom.training.stages import trained_stage
    from qzoom.training.train_stage import make_task

    _warn_unfinished(recipe, console)
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
        console.record(asdict(plan))
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
        console.record(asdict(plan))
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


def _weights(plan: Plan, console: Console) -> None:
    parts = ", ".join(f"{part} {count:,}" for part, count in plan.trained.items())
    console.result(f"trained     {plan.trained_weights:,} weights: {parts}")
    console.result(f"memory      {plan.memory_gb:.1f} GB a process, activations aside")


def _run_stage(recipe: StageRecipe, run: RunOptions, console: Console, *, refit: bool, json: bool) -> None:
    from qzoom.training.train_stage import train_stage

    folder, device = run.folder(recipe.output), find_device(run.device)
    _warn_unfinished(recipe, console)
    with _progress(console) as on_step:
        report = train_stage(recipe, folder, refit=refit, device=device, fresh=run.fresh, on_step=on_step)
    if not _is_main():
        return
    console.warn_few(f"trained on {report.samples} samples", report.samples, "Label more.")
    if json:
        console.record(asdict(report))
        return
    losses = _losses(report.start, report.steps, report.first_loss, report.last_loss)
    console.result(f"{report.steps} steps on {report.samples} samples, {losses}; the model is in {report.model}")


def _run_student(recipe: StudentRecipe, run: RunOptions, console: Console, *, json: bool) -> None:
    from qzoom.training.student.run import train_student

    folder, device = run.folder(recipe.output), find_device(run.device)
    with _progress(console) as on_step:
        report = train_student(
            recipe,
            folder,
            device=device,
            fresh=run.fresh,
            on_phase=lambda phase, steps: console.note(f"{phase}: {steps} steps"),
            on_step=on_step,
            on_validation=lambda validation: console.note(_validation(validation)),
        )
    if not _is_main():
        return
    console.warn_few(f"trained on {report.questions} questions", report.questions, "Export more.")
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


def _warn_unfinished(recipe: StageRecipe, console: Console) -> None:
    """Labels of a run that was stopped are used, and the number of those that are missing is printed."""
    from qzoom.store.records import missing_samples

    for name in recipe.labels:
        folder = Path(name).expanduser()
        missing = missing_samples(folder) if folder.is_dir() else 0
        if missing:
            console.note(
                f"warning: {name} is unfinished: the labels of {missing} questions are missing. Run the command that "
                "makes them again; training uses what is there."
            )


def _losses(start: int, steps: int, first: float | None, last: float | None) -> str:
    figures = "no loss" if first is None or last is None else f"loss {first:.4f} to {last:.4f}"
    return figures + (" (nothing was left to do)" if start == steps else "")


def _validation(validation: Validation) -> str:
    negative = ""
    if validation.exact_negative is not None:
        negative = f", {validation.exact_negative:.1%} of {validation.n_negative} negatives"
    return f"step {validation.step}: {validation.exact:.1%} of {validation.n} held-out questions right{negative}"


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[StepMetrics], None]]:
    """Loss, samples a second and time left: a bar where a person watches, else a line now and then."""
    with console.progress("training", note_every_s=30) as (update,):
        yield lambda metrics: update(metrics.step, metrics.steps, _line(metrics))


def _line(metrics: StepMetrics) -> str:
    minutes, seconds = divmod(int(metrics.left_s), 60)
    return f"loss {metrics.loss:.4f}, {metrics.samples_per_s:.1f} samples/s, {minutes}:{seconds:02d} left"
