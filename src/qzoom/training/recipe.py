"""The recipe of a base model: one checked YAML file with everything that determines its weights.

A recipe holds the architecture, the optimiser's settings and a list of stages; a stage sets its number of steps and the
mix of tasks. Unknown keys are errors, so a typo cannot silently train something else.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from qzoom.errors import ConfigError
from qzoom.settings import read_yaml
from qzoom.training.tiny import TinyArchitecture

__all__ = ["BaseRecipe", "Stage", "load_recipe"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps `steps` long with exercises drawn by the weights in `mix`; the learning-rate factor goes linearly from
    `lr_start` to `lr_end`."""

    name: str
    steps: int
    mix: dict[str, float]
    lr_start: float = 1.0
    lr_end: float = 1.0


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """A base model from scratch, or from the exported weights in `start_from` (their guide heads are learned anew, with
    the towers shielded from them for the first `guide_steps`). One step is `micro_batches` small batches on each of
    `processes` processes; on a GPU there is one process, which gets its batches from `loaders` others and wants them
    larger: `gather` draws in one."""

    stages: tuple[Stage, ...]
    seed: int = 0
    processes: int = 2
    micro_batches: int = 3
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    glyph_weight: float = 0.5
    object_weight: float = 0.5
    pointing_weight: float = 0.3
    pointing_layer: int = 4
    pointing_heads: tuple[int, int] = (0, 2)
    vocabulary_size: int = 640
    bf16: bool = True
    checkpoint_minutes: float = 4.0
    evaluate_every: int = 200
    evaluate_batches: int = 4
    export_minutes: float = 10.0
    final_tasks: tuple[str, ...] = ()
    receipts: str | None = None
    start_from: str | None = None
    guide_steps: int = 60
    architecture: TinyArchitecture = field(default_factory=TinyArchitecture)
    gather: int = 1
    loaders: int = 0

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step and its learning-rate factor."""
        begin = 0
        for stage in self.stages:
            if step < begin + stage.steps:
                share = (step - begin) / max(1, stage.steps)
                return stage, stage.lr_start + (stage.lr_end - stage.lr_start) * share
            begin += stage.steps
        return self.stages[-1], self.stages[-1].lr_end


def load_recipe(path: str | Path) -> BaseRecipe:
    """Read and check a recipe; every mistake is a `ConfigError` that names the key."""
    source = Path(path)
    values = read_yaml(source)
    stages = values.pop("stages", None)
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"Recipe {source} needs a non-empty list `stages`.")
    values["stages"] = tuple(_build(Stage, stage, f"{source}, stage {i + 1}") for i, stage in enumerate(stages))
    values["architecture"] = _build(TinyArchitecture, values.get("architecture") or {}, f"{source}, architecture")
    for name in ("pointing_heads", "final_tasks"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    recipe = _build(BaseRecipe, values, str(source))
    _check(recipe, source)
    return recipe


def _build(kind: type[_T], values: Any, where: str) -> _T:
    """A dataclass from a mapping; unknown or missing keys are errors with a hint."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, found {type(values).__name__}.")
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key `{key}`; {hint}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}.") from error


def _check(recipe: BaseRecipe, source: Path) -> None:
    """Values that would fail late are refused early."""
    from qzoom.training.tasks import TASKS

    for stage in recipe.stages:
        if stage.steps < 1 or not stage.mix:
            raise ConfigError(f"{source}: stage `{stage.name}` needs at least one step and one exercise in `mix`.")
        for task, weight in stage.mix.items():
            if task not in TASKS:
                close = difflib.get_close_matches(task, list(TASKS), n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(TASKS)}."
                raise ConfigError(f"{source}: stage `{stage.name}` mixes the unknown exercise `{task}`; {hint}")
            if weight < 0:
                raise ConfigError(f"{source}: stage `{stage.name}` gives `{task}` a negative weight.")
    for name, least in (("processes", 1), ("micro_batches", 1), ("evaluate_every", 1), ("gather", 1), ("loaders", 0)):
        if getattr(recipe, name) < least:
            raise ConfigError(f"{source}: `{name}` must be at least {least}.")
