"""What a distillation run would do, by arithmetic, without loading a large model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.training.plan import Sizes, find_sizes
from qzoom.training.student.data import Split, read_split
from qzoom.training.student.recipe import DistillRecipe
from qzoom.training.student.run import parts_of, steps_of_part

__all__ = ["DistillPlan", "PartPlan", "make_plan"]


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part in figures.

    Args:
        part: "sft" or "grpo".
        steps: optimiser steps; None when the data are not there yet.
        batch: pictures or questions per step.
        unit: which of the two.
        forwards: forward passes per step, all processes together.
        learning_rate: peak.
    """

    part: str
    steps: int | None
    batch: int
    unit: str
    forwards: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class DistillPlan:
    """A run in figures.

    Args:
        base_weights: of the student.
        trained_weights: that train.
        memory_gb: weights, gradients and optimiser state in GB (10^9 bytes), without activations.
        questions: to train on; None when the data are not there yet, as the next three.
        pictures: they are about.
        negatives: of them, whose target is absent.
        held_out: questions to validate with.
        parts: in order.
    """

    base_weights: int
    trained_weights: int
    memory_gb: float
    questions: int | None
    pictures: int | None
    negatives: int | None
    held_out: int | None
    parts: tuple[PartPlan, ...]


def make_plan(recipe: DistillRecipe) -> DistillPlan:
    """The figures of a run; data that are not there yet are no mistake.

    Raises:
        CheckpointError: a base that is neither on this machine nor in the table of known ones.
        DataError: data that are there but cannot be used.
    """
    sizes = find_sizes(recipe.base)
    trained = _trained(sizes, recipe)
    frozen = sizes.base if recipe.lora_rank else sizes.base - trained
    frozen_bytes = 2 if recipe.lora_rank and recipe.precision == "bfloat16" else 4
    memory = frozen * frozen_bytes + trained * (4 + 4 + 8)
    split = _split(recipe)
    train = None if split is None else split.train
    return DistillPlan(
        sizes.base,
        trained,
        memory / 1e9,
        None if train is None else len(train),
        None if train is None else len({q.picture for q in train}),
        None if train is None else sum(q.negative for q in train),
        None if split is None else len(split.validation),
        tuple(_part(recipe, part, split) for part in parts_of(recipe)),
    )


def _trained(sizes: Sizes, recipe: DistillRecipe) -> int:
    """Weights that train; with LoRA those of the decoder's maps, to which the vision tower adds little."""
    if not recipe.lora_rank:
        return sizes.base - (0 if recipe.vision else sizes.vision)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    maps = [(sizes.hidden, queries), (sizes.hidden, keys), (sizes.hidden, keys), (queries, sizes.hidden)]
    maps += [(sizes.hidden, sizes.intermediate)] * 2 + [(sizes.intermediate, sizes.hidden)]
    return sizes.layers * sum(recipe.lora_rank * (a + b) for a, b in maps)


def _part(recipe: DistillRecipe, part: str, split: Split | None) -> PartPlan:
    settings: Any = getattr(recipe, part)
    steps = settings.steps or None
    if split is not None:
        steps = steps_of_part(recipe, part, split)
    if part == "sft":
        forwards, unit = settings.batch // settings.micro_batch, "pictures"
    else:
        forwards, unit = settings.batch * settings.group // settings.micro_batch, "questions"
    return PartPlan(part, steps, settings.batch, unit, forwards, settings.learning_rate)


def _split(recipe: DistillRecipe) -> Split | None:
    if not recipe.data or not Path(recipe.data).expanduser().is_dir():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        return read_split(Path(recipe.data).expanduser(), Path(scratch), recipe.validation, recipe.seed)
