"""A stage's recipe: one YAML file, checked when it is read. The defaults are the published ones (method.md 5 to 8).

What trains in which stage: one table.

    part       regions  answers  refit  gate        saved as
    vision        .        .       .      .         the base, never written by stages that leave it alone
    embedding     .        .*      .      .
    layers        .        x       .      .         answers: the merged model, or LoRA matrices in the adapter
    norm          .        x       .      .
    lm_head       .        x       .      .
    region        x        .       x      .         the adapter
    gate          .        .       .      x         the adapter

    * where it is the same tensor as lm_head, it moves with it.

Of the region branch's last layer only the input norm, the queries and the keys run (method.md 3); the rest of that
layer never trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qzoom.checkpoints.branches import is_used_in_last
from qzoom.config import ZoomConfig, from_mapping, read_yaml
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qzoom.engine.state import Engine

__all__ = [
    "FREE",
    "PARTS",
    "STAGES",
    "StageRecipe",
    "StageSpec",
    "frozen_in_bfloat16",
    "load_stage_recipe",
    "named_parts",
    "select",
    "trained_stage",
]


FREE = (
    "micro_batch",
    "save_steps",
    "gradient_checkpointing",
    "cache_gb",
    "images",
    "tensorboard",
    "output",
    "original",
)
"""Settings that a resumed run may change: they decide neither the data nor the arithmetic, rounding aside."""


@dataclass(frozen=True, slots=True)
class StageRecipe:
    """One run of one stage.

    Args:
        stage: "regions", "answers" or "gate".
        base: hub id, folder or "tiny": the model that trains.
        labels: folders of records.
        output: where to write when the command line does not say.
        original: the model that the stages began with, for a plan made before `base` is there.
        images: folder of the pictures when they have moved.
        shared_layers: K of new branches; a model that has branches keeps its own.
        branch_layers: T, likewise.
        zoom: further `ZoomConfig` fields of the adapter that is written.
        tokens: visual tokens of the coarse look, drawn from this list; empty takes those of the labels.
        multi_turn: train all turns of a picture in one sequence.
        foreign_labels: accept labels of another model.
        strategy: gate: "consistency", or the ablation "prediction_vs_gt".
        mixture: answers: how many of each kind for one hard case; kinds are hard, improvements, kept.
        random_box: answers: how often the predicted box is replaced by a random one.
        random_side: answers: smallest and largest side of a random box, as a share of the grid.
        region_tokens: answers: most visual tokens of the region.
        lora_rank: answers: 0 trains all weights of the decoder; else LoRA of this rank, kept in the adapter.
        learning_rate: peak.
        batch: samples per optimiser step, all processes together.
        micro_batch: samples per forward and process.
        epochs: passes over the samples; `steps` above 0 overrules it.
        steps: optimiser steps.
        warmup: share of the steps with a rising learning rate; a cosine to zero follows.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        precision: "bfloat16" computes in it with float32 weights; "float32".
        gradient_checkpointing: recompute layers in the backward pass.
        cache_gb: regions and gate: keep what the frozen layers made of each sample in memory, up to so many GB (10^9
            bytes) a process; for small bases.
        seed: of new weights, order and noise.
        save_steps: optimiser steps between checkpoints.
        tensorboard: also write event files, where tensorboard is installed.
    """

    stage: Literal["regions", "answers", "gate"]
    base: str
    labels: tuple[str, ...]
    output: str = ""
    original: str = ""
    images: str = ""
    shared_layers: int = 0
    branch_layers: int = 3
    zoom: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    multi_turn: bool = True
    foreign_labels: bool = False
    strategy: Literal["consistency", "prediction_vs_gt"] = "consistency"
    mixture: dict[str, float] = field(default_factory=lambda: {"hard": 1.0})
    random_box: float = 0.0
    random_side: tuple[float, float] = (0.1, 0.6)
    region_tokens: int = 576
    lora_rank: int = 0
    learning_rate: float = 1e-4
    batch: int = 128
    micro_batch: int = 4
    epochs: float = 1.0
    steps: int = 0
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    cache_gb: float = 0.0
    seed: int = 0
    save_steps: int = 100
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("labels", "tokens", "betas", "random_side"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{name} must be a list, not {value!r}.")
            object.__setattr__(self, name, tuple(value))
        self._check_choices()
        for name in ("branch_layers", "batch", "micro_batch", "save_steps", "region_tokens"):
            _whole(self, name, 1)
        for name in ("shared_layers", "steps", "lora_rank", "seed"):
            _whole(self, name, 0)
        for name, low, high in (
            ("learning_rate", 0.0, 1.0),
            ("warmup", 0.0, 1.0),
            ("random_box", 0.0, 1.0),
            ("weight_decay", 0.0, 10.0),
            ("epochs", 0.0, 1000.0),
            ("clip", 0.0, 1e6),
            ("cache_gb", 0.0, 1e5),
        ):
            _number(name, getattr(self, name), low, high)
        for name in ("betas", "random_side"):
            if len(getattr(self, name)) != 2:
                raise ConfigError(f"{name} must hold two numbers.")
            for value in getattr(self, name):
                _number(name, value, 0.0, 1.0)
        if self.random_side[0] > self.random_side[1]:
            raise ConfigError("random_side must be a smallest and a largest share.")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.tokens):
            raise ConfigError(f"tokens must be a list of whole numbers from 1, not {list(self.tokens)}.")
        unknown = set(self.mixture) - {"hard", "improvements", "kept"}
        if unknown:
            raise ConfigError(f"mixture may name hard, improvements and kept, not {', '.join(sorted(unknown))}.")
        for value in self.mixture.values():
            _number("mixture", value, 0.0, 1000.0)

    def _check_choices(self) -> None:
        for name, choices in (
            ("stage", ("regions", "answers", "gate")),
            ("strategy", ("consistency", "prediction_vs_gt")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        for name in ("multi_turn", "foreign_labels", "gradient_checkpointing", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("zoom", "mixture"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(f"{name} must be a mapping, not {getattr(self, name)!r}.")
        if not isinstance(self.base, str) or not self.base:
            raise ConfigError("base must name the model to train.")
        if not self.labels or not all(isinstance(label, str) and label for label in self.labels):
            raise ConfigError("labels must be a list of at least one folder of records.")

    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON values."""
        import json

        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}
        return dict(json.loads(json.dumps(values)))


def trained_stage(recipe: StageRecipe, refit: bool) -> str:
    """The row of the stage table that a recipe runs.

    Raises:
        ConfigError: a refit of anything but regions.
    """
    if refit and recipe.stage != "regions":
        raise ConfigError(f"--refit belongs to the stage regions; the recipe is of stage {recipe.stage}.")
    return "refit" if refit else recipe.stage


def frozen_in_bfloat16(recipe: StageRecipe, stage: str) -> bool:
    """Whether what does not train is held in bfloat16; what trains is always held in float32."""
    return recipe.precision == "bfloat16" and (stage != "answers" or recipe.lora_rank > 0)


def load_stage_recipe(path: Path, stage: str, changes: Mapping[str, Any] | None = None) -> StageRecipe:
    """Read a YAML recipe.

    Args:
        path: of the file.
        stage: the stage that the command runs; the file must be of it.
        changes: settings that the command line gives instead.

    Raises:
        ConfigError: the file is missing or no YAML, an unknown key (with the closest known one), or a bad value.
    """
    values = read_yaml(path) | dict(changes or {})
    try:
        recipe: StageRecipe = from_mapping(StageRecipe, values, str(path))
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if recipe.stage != stage:
        raise ConfigError(f"{path} is a recipe of stage {recipe.stage}; run it with: qzoom train {recipe.stage}.")
    ZoomConfig.from_dict(dict(recipe.zoom), source=f"{path}: zoom")
    return recipe


def _whole(recipe: StageRecipe, name: str, least: int) -> None:
    value = getattr(recipe, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}, not {value!r}.")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")


Part = Literal["vision", "embedding", "layers", "norm", "lm_head", "region", "gate"]
PARTS: tuple[Part, ...] = ("vision", "embedding", "layers", "norm", "lm_head", "region", "gate")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage.

    Args:
        trains: parts whose weights move.
        saves: "adapter" (branches beside a reference to the base) or "model" (everything; with LoRA an adapter that has
            the matrices too).
        needs: branches that must be there before; a missing one that trains is made from the base's layers.
    """

    trains: tuple[Part, ...]
    saves: Literal["adapter", "model"]
    needs: tuple[Part, ...] = ()


STAGES: dict[str, StageSpec] = {
    "regions": StageSpec(("region",), "adapter"),
    "answers": StageSpec(("layers", "norm", "lm_head"), "model", needs=("region",)),
    "refit": StageSpec(("region",), "adapter", needs=("region",)),
    "gate": StageSpec(("gate",), "adapter", needs=("region",)),
}


def named_parts(engine: Engine) -> dict[str, tuple[Part, nn.Parameter]]:
    """Every weight by a name that starts with its part. Weights that are one tensor have one name."""
    model, decoder = engine.backbone.model, engine.backbone.decoder
    groups: list[tuple[Part, nn.Module | None]] = [
        ("lm_head", model.lm_head),
        ("layers", engine.backbone.layers),
        ("norm", decoder.norm),  # type: ignore[list-item]
        ("embedding", engine.backbone.embedding),
        ("region", engine.region),
        ("gate", engine.gate),
    ]
    out: dict[str, tuple[Part, nn.Parameter]] = {}
    seen: set[int] = set()
    for part, module in groups:
        for name, weight in module.named_parameters() if module is not None else ():
            if id(weight) not in seen:
                seen.add(id(weight))
                out[f"{part}.{name}"] = (part, weight)
    for name, weight in model.named_parameters():
        if id(weight) not in seen:
            seen.add(id(weight))
            out[f"vision.{name}"] = ("vision", weight)
    return out


def select(engine: Engine, stage: str) -> dict[str, nn.Parameter]:
    """Freeze everything but what a stage trains.

    Args:
        engine: with the branches that the stage needs.
        stage: a key of `STAGES`.

    Returns:
        The weights that train, by name.

    Raises:
        ConfigError: a branch is missing.
    """
    spec = STAGES[stage]
    for part in ("region", "gate"):
        if part in (*spec.needs, *spec.trains) and getattr(engine, part) is None:
            raise ConfigError(f"The stage {stage!r} needs a model with a {part} branch; run the earlier stages first.")
    trained: dict[str, nn.Parameter] = {}
    last = f"region.layers.{len(engine.region.layers) - 1}." if engine.region is not None else "-"
    for name, (part, weight) in named_parts(engine).items():
        idle = name.startswith(last) and not is_used_in_last(name.removeprefix(last))
        moves = part in spec.trains and not idle
        weight.requires_grad_(moves)
        if moves:
            trained[name] = weight
    return trained
