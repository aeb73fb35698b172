"""One stage from its recipe to a finished model folder: load, check labels, train, save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoom.backbones.quantized import settle
from qzoom.checkpoints.branches import zoom_identity
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import base_digest
from qzoom.config import ZoomConfig
from qzoom.engine.state import Engine
from qzoom.engine.zoom import check_positions
from qzoom.errors import ConfigError
from qzoom.heads.branches import new_gate, new_region
from qzoom.training.loop import BASE_ZOOM, CHECKPOINT_FILE, make_accelerator, run_loop, steps_of
from qzoom.training.lora import add_lora, finish_lora
from qzoom.training.run import METRICS_FILE, StepMetrics, TrainingRun, clear_run, copy_weights, mean_losses, save_model
from qzoom.training.samples import StageTask, check_labels
from qzoom.training.stages import STAGES, StageRecipe, frozen_in_bfloat16, select, trained_stage
from qzoom.training.tasks import AnswerTask, GateTask, RegionMapTask


@dataclass(frozen=True, slots=True)
class StageReport:
    """Figures of a finished stage."""

    stage: str  # row of the stage table
    model: str  # folder of the result
    samples: int  # trained on
    start: int  # optimiser steps that were done before this process
    steps: int  # optimiser steps of the whole run
    trained: int  # number of weights that trained
    first_loss: float | None  # mean of the first tenth of the run's steps
    last_loss: float | None  # mean of the last tenth
    seconds: float  # of this process


def prepare_engine(base: Engine, recipe: StageRecipe, stage: str) -> Engine:
    """The base with the branch that the stage makes, and its configuration.

    The first stage 1 makes a new region branch, stage 3 a new gate, both from the base's layers (docs/method.md 2, 3)
    (ConfigError: the model lacks what the stage needs).
    """
    torch.manual_seed(recipe.seed)
    if stage != "regions" and base.region is None:
        raise ConfigError(
            f"{recipe.base} has no region branch, which the stage {stage!r} needs; name the model that the earlier "
            "stage wrote as `base` of the recipe."
        )
    config = base.config
    if base.region is None and base.gate is None:
        depth = recipe.shared_layers or base.backbone.nearest_depth(
            round(0.6 * base.backbone.num_layers), recipe.branch_layers
        )
        config = config.replace(shared_layers=depth, branch_layers=recipe.branch_layers)
    config = ZoomConfig.from_dict(config.to_dict() | recipe.zoom, source="zoom")
    if "positions" in recipe.zoom:
        check_positions(base.backbone, config)
    gate, region = base.gate, base.region
    if stage == "regions":
        region = new_region(base.backbone, config.shared_layers, config.branch_layers, norm=config.branch_norm)
    if stage == "gate":
        gate = new_gate(base.backbone, config.shared_layers, config.branch_layers)
    for branch in (gate, region):
        if branch is not None:
            branch.to(base.backbone.device)
    moves = stage == "answers" and not recipe.lora_rank  # then LoRA weights no longer belong to the base's
    return dataclasses.replace(base, gate=gate, region=region, config=config, lora=None if moves else base.lora)


def make_task(recipe: StageRecipe, engine: Engine) -> StageTask:
    """The stage's samples and loss."""
    kinds: dict[str, type[RegionMapTask | AnswerTask | GateTask]] = {
        "regions": RegionMapTask,
        "answers": AnswerTask,
        "gate": GateTask,
    }
    return kinds[recipe.stage](recipe, engine)


def train_stage(
    recipe: StageRecipe,
    output: Path,
    *,
    refit: bool = False,
    device: str = "cpu",
    fresh: bool = False,
    base: Engine | None = None,
    on_step: Callable[[StepMetrics], None] = lambda _: None,
) -> StageReport:
    """Run a stage, or resume it. Nothing is written before the base and the labels have been checked.

    Args:
        recipe: which stage, on what.
        output: gets the checkpoint, `metrics.jsonl`, `report.json` and the result in `model`.
        refit: stage 2.5: train the model's own region branch further.
        base: the loaded base, instead of loading the recipe's.

    Raises:
        ConfigError: settings that do not fit the model, the labels, or an earlier run in `output`.
        DataError: records that cannot be used.
    """
    began, stage = time.monotonic(), trained_stage(recipe, refit=refit)
    accelerator = make_accelerator(recipe, device)
    dtype = "bfloat16" if frozen_in_bfloat16(recipe, stage) else "float32"
    how: dict[str, Any] = {"dtype": dtype, "quantization": recipe.quantization or None}
    loaded = base or load_engine(recipe.base, device_map=str(accelerator.device), **how)
    digest, zoom = base_digest(loaded), zoom_identity(loaded)
    run = TrainingRun(prepare_engine(loaded, recipe, stage), recipe, output, device, on_step)
    task = make_task(recipe, run.engine)
    check_labels(task.stores, digest, zoom, foreign=recipe.foreign_labels)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if fresh:
            clear_run(output, (CHECKPOINT_FILE, METRICS_FILE))
    accelerator.wait_for_everyone()
    settle(run.engine.backbone.model, training=True)
    wrapped, weights = _trained(run.engine, recipe, stage)
    trained = sum(weight.numel() for weight in weights.values())
    identity = recipe.decisive() | {"row": stage, "weights": digest, "samples": task.identity}
    if stage in ("refit", "answers"):  # the branch that the base brings trains, or chooses the regions
        identity |= {BASE_ZOOM: zoom}
    start, gathered = run_loop(run, task, weights, accelerator, identity)
    samples = len(task.weights)
    steps, losses = steps_of(recipe, samples), mean_losses(output)
    report = StageReport(
        stage, str(output / "model"), samples, start, steps, trained, *losses, time.monotonic() - began
    )
    if accelerator.is_main_process:
        engine = _result(run, stage, wrapped, gathered, lambda: load_engine(recipe.base, **how))
        facts = {stage: {"recipe": recipe.decisive(), "base_weights": digest}}
        whole = stage == "answers" and not recipe.lora_rank
        engine = dataclasses.replace(engine, config=_fitted(engine.config, stage))
        save_model(dataclasses.replace(run, engine=engine), report, facts, whole=whole)
    accelerator.wait_for_everyone()
    return report


def _fitted(config: ZoomConfig, stage: str) -> ZoomConfig:
    """The config without a student's note that what this stage trained is older than the student."""
    facts = config.provenance.get("distill")
    if not isinstance(facts, dict) or "stale" not in facts:
        return config
    stale = {part: note for part, note in facts["stale"].items() if part not in STAGES[stage]}
    facts = {key: value for key, value in facts.items() if key != "stale"} | ({"stale": stale} if stale else {})
    return config.replace(provenance=config.provenance | {"distill": facts})


def _result(run: TrainingRun, stage: str, wrapped: Any, gathered: Any, load: Callable[[], Engine]) -> Engine:
    """The trained engine, whole and with its LoRA weights in place."""
    engine = run.engine
    if gathered is not None:  # the engine's own weights are shards; the whole ones go into a fresh copy of the base
        engine = prepare_engine(load(), run.recipe, stage)
        wrapped, weights = _trained(engine, run.recipe, stage)
        copy_weights(weights, gathered)
    return engine if wrapped is None else finish_lora(engine, wrapped)


def _trained(engine: Engine, recipe: StageRecipe, stage: str) -> tuple[Any, dict[str, nn.Parameter]]:
    """peft's wrapper, or None, and the weights that train, in float32 (ConfigError: LoRA on a base that has LoRA
    weights already)."""
    wrapped = None
    if recipe.lora_rank and stage == "answers":
        if engine.lora is not None:
            raise ConfigError(
                "The base has LoRA weights already, and further ones cannot be put beside them; merge them with "
                "`qzoom convert` and train that model, or train all weights with lora_rank: 0."
            )
        wrapped = add_lora(engine, recipe.lora_rank)
        weights = {f"lora.{name}": weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    else:
        weights = select(engine, stage)
    for weight in weights.values():
        weight.data = weight.data.float()
    return wrapped, weights
