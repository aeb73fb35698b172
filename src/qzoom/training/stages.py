"""The recipe of a stage (its defaults are the published ones, docs/method.md 5 to 8), and what trains in which stage.

    part       regions  answers  refit  gate        saved as
    vision        .        .       .      .         the base, never written by stages that leave it alone
    embedding     .        .*      .      .
    layers        .        x       .      .         answers: the merged model, or LoRA matrices in the adapter
    norm          .        x       .      .
    lm_head       .        x       .      .
    region        x        .       x      .         the adapter
    gate          .        .       .      x         the adapter

    * where it is the same tensor as lm_head, it moves with it.

Of the region branch's last layer only the input norm, the queries and the keys run (docs/method.md 3); the rest of that
layer never trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import nn

from qzoom.checkpoints.branches import is_used_in_last
from qzoom.config import ZoomConfig
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, RecipeError
from qzoom.settings import Between, Share, Text, read_settings, settings, to_dict
from qzoom.training.run import TrackerName, without

RESUMABLE_CHANGES = (
    "micro_batch",
    "save_steps",
    "gradient_checkpointing",
    "cache_gb",
    "images",
    "trackers",
    "output",
    "original",
)
"""Settings that a resumed run may change: they decide neither the data nor the arithmetic, rounding aside."""
ADDED_LATER = ("quantization", "other_pictures")
"""Settings that runs begun before them lack; where they are off, such a run goes on."""
KINDS = ("hard", "improvements", "both_right")

Count = Annotated[int, Between(1)]
"""A whole number of at least 1."""
CountOrNone = Annotated[int, Between(0)]
"""A whole number of at least 0."""


@settings
class StageRecipe:
    """One run of one stage."""

    stage: Literal["regions", "answers", "gate"]
    """The stage."""
    base: Text
    """Hub id, folder or "tiny": the model that trains."""
    labels: tuple[Text, ...]
    """Folders of records."""
    output: str = ""
    """Where to write if the command line does not say."""
    original: str = ""
    """The model that the first stage started from, for a plan made before `base` exists."""
    images: str = ""
    """Folder of the images if they have moved."""
    shared_layers: CountOrNone = 0
    """K of new branches, 0 for 0.6 of the decoder's layers; a model that has branches keeps its own."""
    branch_layers: Count = 3
    """T of new branches; a model that has branches keeps its own."""
    zoom: dict[str, Any] = field(default_factory=dict)
    """Further `ZoomConfig` fields of the adapter that is written."""
    tokens: tuple[Count, ...] = ()
    """Numbers of visual tokens of the coarse view, one drawn per sample; empty takes those of the labels."""
    multi_turn: bool = True
    """Train all turns about an image in one sequence."""
    other_pictures: Share = 0.0
    """Regions: how often a question about one picture is asked among one to four others, on which the map must stay
    empty; of those a third are blank pages."""
    foreign_labels: bool = False
    """Accept labels of another model."""
    strategy: Literal["consistency", "prediction_vs_gt"] = "consistency"
    """Gate: how targets are made; "prediction_vs_gt" is the ablation."""
    mixture: dict[str, Annotated[float, Between(0, 1000)]] = field(default_factory=lambda: {"hard": 1.0})
    """Answers: samples of each kind per hard case; the kinds are hard, improvements, both_right."""
    random_box: Share = 0.0
    """Answers: how often a random box replaces the predicted one."""
    random_side: tuple[Share, Share] = (0.1, 0.6)
    """Answers: smallest and largest side of a random box, as a share of the grid."""
    region_tokens: Count = 576
    """Answers: most visual tokens of the region."""
    lora_rank: CountOrNone = 0
    """Answers: 0 trains all weights of the decoder; above 0, LoRA of this rank, kept in the adapter."""
    quantization: Literal["", "4bit", "8bit"] = ""
    """Hold the base in few bits (bitsandbytes); answers then needs a lora_rank. Branches and LoRA never are."""
    region_loss: Literal["bce", "focal"] = "bce"
    """Regions: binary cross entropy, plain or with every cell weighed by how wrong it is (alpha 0.9, gamma 2)."""
    learning_rate: Share = 1e-4
    """Peak."""
    batch: Count = 128
    """Samples per optimiser step, over all processes."""
    micro_batch: Count = 4
    """Samples per forward pass and process."""
    epochs: Annotated[float, Between(0, 1000)] = 1.0
    """Passes over the samples; `steps` above 0 overrides it."""
    steps: CountOrNone = 0
    """Optimiser steps."""
    warmup: Share = 0.03
    """Share of the steps with a rising learning rate; a cosine to zero follows."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """Of AdamW."""
    weight_decay: Annotated[float, Between(0, 10)] = 0.0
    """Of AdamW."""
    clip: Annotated[float, Between(0, 1e6)] = 1.0
    """Largest gradient norm; 0 for none."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """What is computed in; weights that train are float32 in both."""
    gradient_checkpointing: bool = True
    """Recompute layers in the backward pass."""
    cache_gb: Annotated[float, Between(0, 1e5)] = 0.0
    """Regions and gate: memory (GB of 10^9 bytes, per process) for hidden states of the frozen layers; for small
    bases."""
    seed: CountOrNone = 0
    """Of new weights, order and noise."""
    save_steps: Count = 100
    """Optimiser steps between checkpoints."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where the metrics of every step also go: tensorboard (event files in the run's folder), wandb, mlflow; [] for
    none."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise ConfigError("labels must be a list of at least one folder of records.")
        if self.random_side[0] > self.random_side[1]:
            raise ConfigError("random_side must be a smallest and a largest share.")
        if self.quantization and self.stage == "answers" and not self.lora_rank:
            raise ConfigError(
                f"Weights held in {self.quantization} cannot train; set lora_rank (16, say), so that LoRA matrices "
                "beside them do."
            )
        unknown = set(self.mixture) - set(KINDS)
        if unknown:
            known = f"{', '.join(KINDS[:-1])} and {KINDS[-1]}"
            raise ConfigError(f"mixture may name {known}, not {', '.join(sorted(unknown))}.")

    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share, as JSON values."""
        values = without(to_dict(self), RESUMABLE_CHANGES)
        return {name: value for name, value in values.items() if value or name not in ADDED_LATER}


def trained_stage(recipe: StageRecipe, *, refit: bool) -> str:
    """The row of the stage table that a recipe runs (ConfigError: a refit of anything but regions)."""
    if refit and recipe.stage != "regions":
        raise ConfigError(f"--refit belongs to the stage regions; the recipe is of stage {recipe.stage}.")
    return "refit" if refit else recipe.stage


def frozen_in_bfloat16(recipe: StageRecipe, stage: str) -> bool:
    """Whether frozen weights are held in bfloat16; weights that train are always held in float32."""
    return recipe.precision == "bfloat16" and (stage != "answers" or recipe.lora_rank > 0)


def load_stage_recipe(path: Path, stage: str, changes: Mapping[str, Any] | None = None) -> StageRecipe:
    """Read a YAML recipe of the stage that the command runs; settings in `changes` win over the file (RecipeError: as
    `qzoom.settings.read_settings`, or a recipe of another stage)."""
    recipe = read_settings(StageRecipe, path, changes=changes)
    if recipe.stage != stage:
        raise RecipeError(f"{path} is a recipe of stage {recipe.stage}; run it with: qzoom train {recipe.stage}.")
    try:
        ZoomConfig.from_dict(dict(recipe.zoom), source=f"{path}: zoom")
    except ConfigError as error:
        raise RecipeError(str(error)) from error
    return recipe


Part = Literal["vision", "embedding", "layers", "norm", "lm_head", "region", "gate"]
PARTS: tuple[Part, ...] = ("vision", "embedding", "layers", "norm", "lm_head", "region", "gate")

STAGES: dict[str, tuple[Part, ...]] = {
    "regions": ("region",),
    "answers": ("layers", "norm", "lm_head"),
    "refit": ("region",),
    "gate": ("gate",),
}
"""Parts that train. All stages but the first need a region branch; a branch that trains is made where it is missing."""


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
        ("vision", model),  # what is left of it
    ]
    out: dict[str, tuple[Part, nn.Parameter]] = {}
    seen: set[int] = set()
    for part, module in groups:
        for name, weight in module.named_parameters() if module is not None else ():
            if id(weight) not in seen:
                seen.add(id(weight))
                out[f"{part}.{name}"] = (part, weight)
    return out


def select(engine: Engine, stage: str) -> dict[str, nn.Parameter]:
    """Freeze everything but what a stage trains; returns the weights that train, by name (ConfigError: a branch that
    the stage needs or trains is missing)."""
    for part in ("region", "gate"):
        if (part == "region" or part in STAGES[stage]) and getattr(engine, part) is None:
            raise ConfigError(f"The stage {stage!r} needs a model with a {part} branch; run the earlier stages first.")
    trained: dict[str, nn.Parameter] = {}
    last = f"region.layers.{len(engine.region.layers) - 1}." if engine.region is not None else "-"
    for name, (part, weight) in named_parts(engine).items():
        idle = name.startswith(last) and not is_used_in_last(name.removeprefix(last))
        moves = part in STAGES[stage] and not idle
        weight.requires_grad_(moves)
        if moves:
            trained[name] = weight
    return trained
