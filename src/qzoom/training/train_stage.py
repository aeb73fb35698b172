"""One stage from its recipe to a finished artefact: load, check labels, train, save."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoom.config import ZoomConfig
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError
from qzoom.heads.branches import new_gate, new_region
from qzoom.labels.label_regions import base_digest
from qzoom.training.loop import CHECKPOINT_NAME as CHECKPOINT
from qzoom.training.loop import METRICS_FILE as METRICS
from qzoom.training.loop import StageModule, StepFacts, make_accelerator, run_loop
from qzoom.training.lora import add_lora, finish_lora
from qzoom.training.samples import StageTask, check_labels
from qzoom.training.stages import STAGES, StageRecipe, frozen_in_bfloat16, select, trained_stage

__all__ = ["StageReport", "make_task", "prepare_engine", "train_stage"]


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage came to.

    Args:
        stage: which row of the table.
        model: folder of the artefact.
        samples: trained on.
        steps: optimiser steps.
        trained: number of weights that trained.
        first_loss: mean of the first tenth of this process's steps.
        last_loss: mean of the last tenth; None when there was nothing left to do.
        seconds: of this process's steps.
    """

    stage: str
    model: str
    samples: int
    steps: int
    trained: int
    first_loss: float | None
    last_loss: float | None
    seconds: float


def prepare_engine(base: Engine, recipe: StageRecipe, stage: str) -> Engine:
    """The base with the branch that the stage makes, and its arithmetic.

    A first stage 1 makes a new region branch, a stage 3 a new gate, both from the base's layers (method.md 2 and 3).

    Raises:
        ConfigError: the model lacks what the stage needs.
    """
    torch.manual_seed(recipe.seed)
    for part in STAGES[stage].needs:
        if getattr(base, part) is None:
            raise ConfigError(
                f"{recipe.base} has no {part} branch, which the stage {stage!r} needs; name the model that the earlier "
                "stage wrote as `base` of the recipe."
            )
    fresh = base.region is None and base.gate is None
    config = base.config
    if fresh:
        depth = recipe.shared_layers or max(1, round(0.6 * base.backbone.num_layers))
        config = config.replace(shared_layers=depth, branch_layers=recipe.branch_layers)
    config = ZoomConfig.from_dict(config.to_dict() | recipe.zoom, source="zoom")
    gate, region = base.gate, base.region
    if stage == "regions":
        region = new_region(base.backbone, config.shared_layers, config.branch_layers)
    if stage == "gate":
        gate = new_gate(base.backbone, config.shared_layers, config.branch_layers)
    engine = dataclasses.replace(base, gate=gate, region=region, config=config)
    for branch in (gate, region):
        if branch is not None:
            branch.to(base.backbone.device)
    return engine


def make_task(recipe: StageRecipe, engine: Engine) -> StageTask:
    """The stage's samples and loss."""
    if recipe.stage == "regions":
        from qzoom.training.regions import RegionTask

        return RegionTask(recipe, engine)
    if recipe.stage == "gate":
        from qzoom.training.gate import GateTask

        return GateTask(recipe, engine)
    from qzoom.training.answers import AnswerTask

    return AnswerTask(recipe, engine)


def train_stage(
    recipe: StageRecipe,
    output: Path,
    *,
    refit: bool = False,
    device: str = "cpu",
    fresh: bool = False,
    base: Engine | None = None,
    on_step: Callable[[StepFacts], None] = lambda _: None,
) -> StageReport:
    """Run a stage; the same command goes on where it was stopped.

    Args:
        recipe: which stage, on what.
        output: gets the checkpoint, `metrics.jsonl`, `report.json` and the artefact in `model`.
        refit: stage 2.5: go on with the model's own region branch.
        device: "cpu" or "cuda".
        fresh: start over.
        base: the loaded base, instead of loading the recipe's.
        on_step: called with each step's facts.

    Raises:
        ConfigError: settings that do not fit the model, the labels, or an earlier run in `output`.
        DataError: records that cannot be used.
    """
    from qzoom.checkpoints.load import load_engine

    stage = trained_stage(recipe, refit)
    accelerator = make_accelerator(recipe, device)
    if accelerator.is_main_process:
        _make_folder(output, fresh)
    accelerator.wait_for_everyone()
    dtype = "bfloat16" if frozen_in_bfloat16(recipe, stage) else "float32"
    loaded = base or load_engine(recipe.base, dtype=dtype, device_map=str(accelerator.device))
    digest = base_digest(loaded)
    engine = prepare_engine(loaded, recipe, stage)
    task = make_task(recipe, engine)
    check_labels(task.stores, digest, recipe.foreign_labels)  # type: ignore[attr-defined]
    wrapped, weights = _trained(engine, recipe, stage)
    trained = sum(weight.numel() for weight in weights.values())
    run = recipe.decisive() | {"row": stage, "weights": digest, "samples": task.identity}
    began = time.monotonic()
    made = run_loop(engine, task, weights, recipe, output, run, accelerator, on_step=on_step)
    first, last = _ends(made.losses)
    folder, seconds = str(output / "model"), time.monotonic() - began
    report = StageReport(stage, folder, len(task.weights), made.steps, trained, first, last, seconds)
    if accelerator.is_main_process:
        if made.gathered is not None:
            engine = prepare_engine(load_engine(recipe.base, dtype=dtype), recipe, stage)
            wrapped, weights = _trained(engine, recipe, stage)
            StageModule(engine, task, weights).load_state_dict(made.gathered)
        if wrapped is not None:
            finish_lora(engine, wrapped, _base_of(engine))
        _save(engine, recipe, stage, report, output, digest)
    accelerator.wait_for_everyone()
    return report


def _trained(engine: Engine, recipe: StageRecipe, stage: str) -> tuple[Any, dict[str, nn.Parameter]]:
    """peft's wrapper, or None, and the weights that train, in float32."""
    lora = recipe.lora_rank > 0 and stage == "answers"
    wrapped, weights = add_lora(engine, recipe.lora_rank) if lora else (None, select(engine, stage))
    if stage == "answers" and not lora:
        engine.backbone.lora = None  # the weights that they were added to are about to move
    for weight in weights.values():
        weight.data = weight.data.float()
    return wrapped, weights


def _make_folder(output: Path, fresh: bool) -> None:
    """The run's folder; what an earlier run left in it goes when asked for."""
    output.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (CHECKPOINT, METRICS, "report.json"):
            (output / name).unlink(missing_ok=True)


def _save(engine: Engine, recipe: StageRecipe, stage: str, report: StageReport, output: Path, digest: str) -> None:
    """The artefact: an adapter that refers to its base, or after training all of the decoder the whole model."""
    from qzoom.checkpoints.adapter import save_pretrained

    figures = {name: value for name, value in asdict(report).items() if name != "model"}
    facts: dict[str, Any] = {"recipe": recipe.decisive(), "report": figures, "base_weights": digest}
    provenance = engine.config.provenance | {stage: json.loads(json.dumps(facts))}
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.to(engine.backbone.dtype).requires_grad_(False)
    out = dataclasses.replace(engine, config=engine.config.replace(provenance=provenance))
    target = output / "model"
    if STAGES[stage].saves == "model" and not recipe.lora_rank:
        stored = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        for part in (engine.backbone.model, engine.gate, engine.region):
            if part is not None:
                part.to(stored)
        save_pretrained(out, target, include_base=True)
    else:
        save_pretrained(out, target, base_id=_base_of(engine), base_revision=_revision_of(engine))
    (output / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def _base_of(engine: Engine) -> str:
    """Hub id or folder that the base model was loaded from."""
    name = str(getattr(engine.backbone.model.config, "_name_or_path", "") or "")
    if not name:
        raise ConfigError("Where the base model comes from is not known, so an adapter cannot refer to it.")
    return name


def _revision_of(engine: Engine) -> str | None:
    revision = getattr(engine.backbone.model.config, "_commit_hash", None)
    return None if revision is None else str(revision)


def _ends(losses: tuple[float, ...]) -> tuple[float | None, float | None]:
    """Means of the first and of the last tenth; None without steps."""
    tenth = max(1, len(losses) // 10)
    return (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else (None, None)
