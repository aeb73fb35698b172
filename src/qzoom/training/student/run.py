"""One run of a student from its recipe to a model folder: load, read data, train phase by phase, keep the best, save.

OUT/run.json       what a resumed run must share
OUT/pictures/      the images of the data, each once
OUT/sft, OUT/grpo  checkpoints, metrics.jsonl, log.jsonl, the best and the final weights of a phase
OUT/model          the result, heads included
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import base_digest
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError, RecipeError
from qzoom.llm.settings import CallSettings
from qzoom.scoring.judge import open_judge
from qzoom.store.log import write_atomic
from qzoom.training.lora import add_lora
from qzoom.training.run import (
    StepMetrics,
    TrainingRun,
    check_same_run,
    clear_run,
    copy_weights,
    mean_losses,
    read_tensors,
    save_model,
    save_tensors,
    without_deprecations,
)
from qzoom.training.student.collate import Collator, Prompter
from qzoom.training.student.data import Split, check_folder, digest_of, read_split
from qzoom.training.student.recipe import StudentRecipe
from qzoom.training.student.schedule import draw_rehearsal, epoch_entries, make_schedule
from qzoom.training.student.validate import StudentCallback, Validation, last_checkpoint

FINAL_FILE = "final.safetensors"
RUN_FILE = "run.json"
_STALE = {
    "gate": "Fitted on the model before this training; fit it again: qzoom label gate, train gate.",
    "region": "Fitted on the model before this training; fit it again: qzoom label regions, train regions --refit.",
}


@dataclass(frozen=True, slots=True)
class PhaseReport:
    """Figures of a finished phase."""

    phase: str  # "sft" or "grpo"
    start: int  # optimiser steps that were done before this process
    steps: int  # optimiser steps of the whole phase
    first_loss: float | None  # mean of the first tenth of the phase's steps
    last_loss: float | None  # mean of the last tenth
    best_step: int | None  # of the weights that were kept; None without validation
    seconds: float  # of this process


@dataclass(frozen=True, slots=True)
class StudentReport:
    """Figures of a finished run."""

    model: str  # folder of the result
    questions: int  # trained on
    negatives: int  # of them, whose target is absent
    held_out: int  # questions kept for validation
    trained: int  # number of weights that trained
    phases: tuple[PhaseReport, ...]  # in order
    validations: tuple[Validation, ...]  # of this process, in order


def train_student(
    recipe: StudentRecipe,
    output: Path,
    *,
    device: str = "cpu",
    fresh: bool = False,
    base: Engine | None = None,
    on_phase: Callable[[str, int], None] = lambda phase, steps: None,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
    on_validation: Callable[[Validation], None] = lambda _: None,
) -> StudentReport:
    """Run a recipe, or resume it. Nothing is written before the base and the folder of the data have been checked.

    Args:
        output: see the module.
        base: the loaded student, instead of loading the recipe's.

    Raises:
        ConfigError: settings that do not fit an earlier run in `output`, or a missing package.
        DataError: data that cannot be used.
    """
    _check_packages()
    from accelerate import PartialState

    if not recipe.data:
        raise RecipeError("The recipe names no data; give the folder that `qzoom distill` exported to with --data.")
    folder = Path(recipe.data).expanduser()
    check_folder(folder)
    engine = base or load_student(recipe, device)
    engine.backbone.need_bare_grid("Training a student")
    digest = base_digest(engine)
    engine = dataclasses.replace(engine, lora=None)  # the base's LoRA weights train as part of its own from here on
    run = TrainingRun(engine, recipe, output, device, on_step, on_phase, on_validation)
    if run.is_main:
        output.mkdir(parents=True, exist_ok=True)
        if fresh:
            clear_run(output, ("sft", "grpo", RUN_FILE))
    if run.processes > 1:
        PartialState(cpu=device == "cpu").wait_for_everyone()
    split = read_split(folder, output / "pictures", recipe.validation, recipe.seed)
    if run.is_main:
        _check_run(run, digest, split)
    model, weights = prepare_student(engine, recipe)
    done = [run_phase(run, phase, model, weights, split) for phase in recipe.phases]
    result = StudentReport(
        model=str(output / "model"),
        questions=len(split.train),
        negatives=sum(q.negative for q in split.train),
        held_out=len(split.validation),
        trained=sum(weight.numel() for weight in weights.values()),
        phases=tuple(report for report, _ in done),
        validations=tuple(validation for _, found in done for validation in found),
    )
    if run.is_main:
        if recipe.lora_rank:
            model.merge_and_unload()
        facts = {"recipe": recipe.decisive(), "base_weights": digest}
        stale = {name: _STALE[name] for name in _STALE if getattr(engine, name) is not None}
        save_model(run, result, {"distill": facts | ({"stale": stale} if stale else {})}, whole=True)
    return result


def load_student(recipe: StudentRecipe, device: str) -> Engine:
    """The recipe's base on a device; with LoRA, frozen weights are held in the recipe's precision (CheckpointError: it
    cannot be found or read)."""
    dtype = "bfloat16" if recipe.lora_rank and recipe.precision == "bfloat16" else "float32"
    target = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    return load_engine(recipe.base, dtype=dtype, device_map=target)


def prepare_student(engine: Engine, recipe: StudentRecipe) -> tuple[Any, dict[str, nn.Parameter]]:
    """Choose what trains in the engine's model and put LoRA's matrices in; gate and region branch stay as they are.

    Returns:
        The model for the trainer, and the weights that train by name, in float32.

    Raises:
        ConfigError: peft is missing.
    """
    model: Any = engine.backbone.model
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.requires_grad_(False)
    model.requires_grad_(recipe.lora_rank == 0)
    if recipe.lora_rank:
        model = add_lora(engine, recipe.lora_rank, vision=recipe.vision)
    elif not recipe.vision:
        engine.backbone.vision_tower.requires_grad_(False)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    return model, weights


def steps_of_phase(recipe: StudentRecipe, phase: str, split: Split) -> int:
    """Optimiser steps of a phase."""
    settings: Any = getattr(recipe, phase)
    if settings.steps:
        return int(settings.steps)
    most = _questions_per_entry(recipe, phase)
    entries = len(epoch_entries(split.train, most, recipe.negatives, epoch=0, seed=recipe.seed))
    return max(1, round(settings.epochs * entries / (1.0 - recipe.rehearsal) / settings.batch))


def run_phase(
    run: TrainingRun[StudentRecipe], phase: str, model: Any, weights: dict[str, nn.Parameter], split: Split
) -> tuple[PhaseReport, list[Validation]]:
    """Train a phase in a folder of the run's, or resume it; the weights of a finished phase are only loaded. Returns
    the report and the validations of this process."""
    began, recipe = time.monotonic(), run.recipe
    steps = steps_of_phase(recipe, phase, split)
    run.on_phase(phase, steps)
    run = dataclasses.replace(run, folder=run.folder / phase)
    run.folder.mkdir(parents=True, exist_ok=True)
    start, validations = steps, []
    if (run.folder / FINAL_FILE).is_file():
        tensors, metadata = read_tensors(run.folder / FINAL_FILE)
        copy_weights(weights, tensors)
        best_step = int(metadata["step"]) if metadata.get("step") else None
    else:
        callback = StudentCallback(run, phase, steps, split.validation, weights)
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_deprecations())
            # Trainers put their own forward on the model; afterwards it is the class's again.
            stack.callback(run.engine.backbone.model.__dict__.pop, "forward", None)
            judge = None
            if recipe.grpo.judge is not None:
                calls = CallSettings(retries=5, budget_requests=recipe.grpo.judge_budget)
                asked = open_judge(recipe.grpo.judge, calls, run.folder.parent / "calls.sqlite")
                judge = stack.enter_context(contextlib.closing(asked)).right
            trainer = _trainer(run, phase, model, split, steps, judge=judge, callbacks=[callback])
            last = last_checkpoint(run.folder)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        best_step = callback.restore_best()
        if run.is_main:
            save_tensors(run.folder / FINAL_FILE, weights, {"step": "" if best_step is None else str(best_step)})
        start, validations = callback.start, callback.validations
    seconds = time.monotonic() - began
    return PhaseReport(phase, start, steps, *mean_losses(run.folder), best_step, seconds), validations


def _trainer(
    run: TrainingRun[StudentRecipe],
    phase: str,
    model: Any,
    split: Split,
    steps: int,
    *,
    judge: Any,
    callbacks: list[Any],
) -> Any:
    """The trainer of a phase."""
    from qzoom.training.student.trainers import make_grpo_trainer, make_sft_trainer, uses_plain_attention

    recipe, prompter = run.recipe, Prompter(run.engine, run.recipe)
    schedule = make_schedule(
        split.train,
        steps=steps,
        batch=getattr(recipe, phase).batch,
        most=_questions_per_entry(recipe, phase),
        tokens=recipe.tokens,
        negatives=recipe.negatives,
        rehearsal=recipe.rehearsal,
        seed=recipe.seed if phase == "sft" else recipe.seed + 1,
        crops=recipe.random_crops if phase == "sft" else None,
    )
    if phase == "sft":
        rehearsal = partial(draw_rehearsal, most=max(2, recipe.sft.questions))
        masked, regions = uses_plain_attention(run), recipe.attention_supervision.weight > 0
        collator = Collator(prompter, split.train, schedule, rehearsal, masked=masked, regions=regions)
        return make_sft_trainer(run, model, collator, steps, callbacks)
    cached = lru_cache(maxsize=2 * recipe.grpo.batch)(partial(draw_rehearsal, most=1))
    collator = Collator(prompter, split.train, schedule, cached)
    return make_grpo_trainer(run, model, collator, steps, judge=judge, callbacks=callbacks)


def _questions_per_entry(recipe: StudentRecipe, phase: str) -> int:
    return recipe.sft.questions if phase == "sft" else 1


def _check_packages() -> None:
    try:
        import accelerate
        import datasets
        import trl
    except ImportError as error:
        raise ConfigError(
            f"`qzoom train student` needs the package {error.name}; install it with: "
            "pip install 'qzoom[distill,train]'."
        ) from error
    del accelerate, datasets, trl


def _check_run(run: TrainingRun[StudentRecipe], weights: str, split: Split) -> None:
    """Resume the same run only; a new one is written down."""
    data = {"train": digest_of(split.train), "held_out": digest_of(split.validation)}
    here = run.recipe.decisive() | {"weights": weights, **data}
    path = run.folder / RUN_FILE
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged; start over with --fresh.") from error
        check_same_run(there, here, run.folder)
        return
    write_atomic(path, json.dumps(here, indent=2, sort_keys=True) + "\n")
