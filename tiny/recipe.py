"""The recipe of the embedded model: everything that decides its weights, as one checked YAML file.

A recipe holds the architecture, the optimiser's numbers, the packs to draw from and a list of stages; a stage says how
many minutes to train and which exercises to mix. Minutes are the process's own CPU time (on a GPU: of the clock), so
a run that shares its core with others is as long as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qzoom.config import read_yaml
from qzoom.errors import ConfigError
from tiny.aux_losses import GuideWeights
from tiny.curriculum import EXERCISES
from tiny.model import TinyArchitecture

__all__ = ["PackCounts", "Recipe", "Stage", "load_recipe"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Settings):
    """`minutes` of training on the exercises in `mix`, by share of the work; the learning-rate factor goes linearly
    from `lr_start` to `lr_end`."""

    name: str
    minutes: float = Field(gt=0)
    mix: dict[str, float] = Field(min_length=1)
    lr_start: float = Field(default=1.0, ge=0)
    lr_end: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _known(self) -> Stage:
        for name, share in self.mix.items():
            if name not in EXERCISES:
                raise ValueError(
                    f"stage `{self.name}` mixes the unknown exercise `{name}`; known: {', '.join(EXERCISES)}"
                )
            if share <= 0:
                raise ValueError(f"stage `{self.name}` gives `{name}` no share")
        return self


class PackCounts(_Settings):
    """Pages to draw into each pack; held-out packs hold `held_out` pages each. `seed` decides all of them."""

    sheets: int = Field(default=2500, ge=1)
    documents: int = Field(default=1500, ge=1)
    scenes: int = Field(default=400, ge=1)
    held_out: int = Field(default=60, ge=1)
    seed: int = Field(default=1, ge=0)


class Recipe(_Settings):
    """An embedded model from scratch, or from the exported weights in `start_from` (the guides are learned anew, the
    tower shielded from them for the first `guide_steps`). A step takes examples that fill about `step_positions`
    sequence positions, in batches of about `batch_positions`."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    packs: str = "runs/packs"
    pack_counts: PackCounts = PackCounts()
    receipts: str | None = None
    start_from: str | None = None
    guide_steps: int = Field(default=60, ge=0)
    seed: int = Field(default=0, ge=0)
    architecture: TinyArchitecture = TinyArchitecture()
    vocabulary_size: int = Field(default=640, ge=264)
    step_positions: int = Field(default=12_000, ge=1)
    batch_positions: int = Field(default=2048, ge=1)
    muon_lr: float = Field(default=8e-3, gt=0)
    adamw_lr: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=50, ge=1)
    glyph_weight: float = 0.5
    line_weight: float = 0.5
    object_weight: float = 0.5
    pointing_weight: float = 0.3
    pointing_layer: int = 4
    pointing_heads: tuple[int, int] = (0, 2)
    bf16: bool = True
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    evaluate_minutes: float = Field(default=10.0, gt=0)
    export_minutes: float = Field(default=10.0, gt=0)
    evaluate_examples: int = Field(default=48, ge=1)
    evaluate: tuple[str, ...] = ()

    @property
    def minutes(self) -> float:
        """Minutes of all stages together."""
        return sum(stage.minutes for stage in self.stages)

    @property
    def guide_weights(self) -> GuideWeights:
        """The guides' weights as the model takes them."""
        return GuideWeights(
            self.glyph_weight,
            self.line_weight,
            self.object_weight,
            self.pointing_weight,
            self.pointing_layer,
            self.pointing_heads,
        )

    @property
    def exercises(self) -> set[str]:
        """All exercises of all stages and of the measuring."""
        return {name for stage in self.stages for name in stage.mix} | set(self.evaluate)

    def at(self, minutes: float) -> tuple[Stage, float]:
        """The stage after this many minutes and its learning-rate factor."""
        begin = 0.0
        for stage in self.stages:
            if minutes < begin + stage.minutes:
                share = (minutes - begin) / stage.minutes
                return stage, stage.lr_start + (stage.lr_end - stage.lr_start) * share
            begin += stage.minutes
        return self.stages[-1], self.stages[-1].lr_end


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and check a recipe; every mistake is a `ConfigError` that names the key."""
    try:
        return Recipe(**{**read_yaml(path), **(overrides or {})})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"Recipe {path}: {where or 'recipe'}: {first['msg']}.") from error
