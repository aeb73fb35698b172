"""What a run would do, by arithmetic: trainable weights, memory and steps, without loading a large model."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qzoom.backbones.base import ModelSizes
from qzoom.backbones.registry import FAMILIES, backbone_class, published_sizes
from qzoom.checkpoints.format import CONFIG_FILE, read_adapter_config
from qzoom.checkpoints.hub import find_source
from qzoom.errors import CheckpointError, ConfigError
from qzoom.training.stages import STAGES, Part, StageRecipe, frozen_in_bfloat16
from qzoom.training.student.data import read_split

if TYPE_CHECKING:
    from qzoom.training.student.recipe import StudentRecipe


def trained_weights(sizes: ModelSizes, stage: str, branch_layers: int) -> dict[Part, int]:
    """Weights that a stage trains, by part."""
    counts: dict[Part, int] = {
        "region": (branch_layers - 1) * sizes.layer + sizes.attention_in,
        "gate": branch_layers * sizes.layer + sizes.hidden + 1,
        "layers": sizes.layers * sizes.layer,
        "norm": sizes.hidden,
        "lm_head": sizes.table,
    }
    return {part: counts[part] for part in STAGES[stage]}


def lora_layer(sizes: ModelSizes, rank: int) -> int:
    """LoRA weights of all linear maps of one layer."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    maps = [(sizes.hidden, queries), (sizes.hidden, keys), (sizes.hidden, keys), (queries, sizes.hidden)]
    maps += [(sizes.hidden, sizes.intermediate)] * 2 + [(sizes.intermediate, sizes.hidden)]
    return sum(rank * (a + b) for a, b in maps)


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """One phase in figures: a stage, or "sft" or "grpo" of a student."""

    phase: str  # its name
    steps: int | None  # optimiser steps; None while the data do not exist
    batch: int  # units per step
    unit: str  # "samples", "images" or "questions"
    forwards: int  # forward passes per step: of each process in a stage, of all processes together for a student
    learning_rate: float  # peak


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in figures."""

    base_weights: int  # of the base model
    trained: dict[str, int]  # weights that train, by part
    memory_gb: float  # weights, gradients and optimiser state in GB (10^9 bytes), without activations
    samples: int | None  # labels or questions to train on; None while the data do not exist, as the next three
    images: int | None  # of a student's data
    negatives: int | None  # questions of a student's data whose target is absent
    held_out: int | None  # questions of a student's data to validate with
    phases: tuple[PlannedPhase, ...]  # in order

    @property
    def trained_weights(self) -> int:
        """All weights that train."""
        return sum(self.trained.values())


def plan_stage(recipe: StageRecipe, stage: str, sizes: ModelSizes, samples: int | None, *, processes: int = 1) -> Plan:
    """The figures of a stage, on so many samples (None if not known) and processes that share a batch."""
    from qzoom.training.loop import steps_of

    trained = {str(part): count for part, count in trained_weights(sizes, stage, recipe.branch_layers).items()}
    lora = bool(recipe.lora_rank) and stage == "answers"
    if lora:
        trained = {"layers": sizes.layers * lora_layer(sizes, recipe.lora_rank)}
    moving = sum(trained.values())
    frozen = sizes.base - (moving if stage == "answers" and not lora else 0)
    memory = _memory_gb(frozen, moving, half=frozen_in_bfloat16(recipe, stage))
    if recipe.quantization:
        maps = sizes.layers * sizes.layer
        memory -= maps * (2 if frozen_in_bfloat16(recipe, stage) else 4) * 1e-9
        memory += maps * _QUANTIZED_BYTES[recipe.quantization] * 1e-9
    steps = steps_of(recipe, samples) if samples else recipe.steps or None
    forwards = math.ceil(recipe.batch / processes / recipe.micro_batch)
    phase = PlannedPhase(stage, steps, recipe.batch, "samples", forwards, recipe.learning_rate)
    return Plan(sizes.base, trained, memory, samples, None, None, None, (phase,))


def plan_student(recipe: StudentRecipe) -> Plan:
    """The figures of a student's run; data that do not exist yet are no mistake (CheckpointError: a base that is
    neither on this machine nor in the table of known ones; DataError: data that cannot be used)."""
    from qzoom.training.student.run import steps_of_phase

    sizes, lora = find_sizes(recipe.base), bool(recipe.lora_rank)
    trained = {"model": sizes.base - (0 if recipe.vision else sizes.vision)}
    if lora:
        # the vision tower adds little to the decoder's maps
        trained = {"layers": sizes.layers * lora_layer(sizes, recipe.lora_rank)}
    moving = sum(trained.values())
    memory = _memory_gb(sizes.base - (0 if lora else moving), moving, half=lora and recipe.precision == "bfloat16")
    split, folder = None, Path(recipe.data).expanduser()
    if recipe.data and folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            split = read_split(folder, Path(scratch), recipe.validation, recipe.seed)
    phases = []
    for name in recipe.phases:
        settings: Any = getattr(recipe, name)
        steps = steps_of_phase(recipe, name, split) if split is not None else settings.steps or None
        total, unit = (settings.batch, "images") if name == "sft" else (settings.batch * settings.group, "questions")
        forwards = total // settings.micro_batch
        phases.append(PlannedPhase(name, steps, settings.batch, unit, forwards, settings.learning_rate))
    counts: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    if split is not None:
        negatives = sum(q.negative for q in split.train)
        counts = len(split.train), len({q.picture for q in split.train}), negatives, len(split.validation)
    return Plan(sizes.base, trained, memory, *counts, tuple(phases))


_QUANTIZED_BYTES = {"4bit": 0.52, "8bit": 1.0}
"""Per weight; NF4 has an 8-bit scale per 64 weights, and a float32 one per 256 scales."""


def _memory_gb(frozen: int, trained: int, *, half: bool) -> float:
    """GB of frozen weights, and of trained ones with gradient and AdamW's state in float32."""
    return (frozen * (2 if half else 4) + trained * (4 + 4 + 8)) / 1e9


def find_sizes(base: str) -> ModelSizes:
    """The sizes of a base, from its own config where it is on this machine, else from the table of known bases
    (CheckpointError: neither on this machine nor in the table)."""
    published = published_sizes()
    if base in published:
        return published[base]
    source = find_source(base, None)
    folder = source.folder
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        return find_sizes(str(Path(folder, read_adapter_config(folder).base.id)))
    return sizes_of(folder)


def sizes_of(folder: Path) -> ModelSizes:
    """The sizes in a model folder's config.json; the vision part is counted on a model without storage
    (CheckpointError: no config of a family that is supported)."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("model_type")
        layout = backbone_class(kind).released_layout(settings) if kind in FAMILIES else None
        config: Any = AutoConfig.from_pretrained(folder) if layout is None else layout.config(settings, None)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no model config that can be read; name a model folder.") from error
    text = config.get_text_config()
    if config.model_type not in FAMILIES:
        raise ConfigError(f"Models of type {config.model_type!r} have no training plan.")
    parts = (model.get_decoder(), model.lm_head)
    elsewhere = {id(weight) for part in parts for weight in part.parameters()}
    names = [name for name, _ in model.get_decoder().named_parameters()]
    sizes = ModelSizes(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        vision=sum(weight.numel() for weight in model.parameters() if id(weight) not in elsewhere),
        qkv_bias=any(name.endswith("layers.0.self_attn.q_proj.bias") for name in names),
        qk_norm=any(name.endswith("layers.0.self_attn.q_norm.weight") for name in names),
    )
    if sizes.base != sum(weight.numel() for weight in model.parameters()):
        raise ConfigError(
            f"Models of type {config.model_type!r} have no training plan: it would count other weights than they have; "
            "leave out --dry-run."
        )
    return sizes
