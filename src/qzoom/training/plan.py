"""What a run would do, by arithmetic: trainable weights, memory and steps, without loading a large model.

Sizes come from the model's own config when it is on this machine, else from the table of the known bases.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import CheckpointError, ConfigError
from qzoom.training.stages import STAGES, Part, StageRecipe, frozen_in_bfloat16

if TYPE_CHECKING:
    from qzoom.training.student.recipe import StudentRecipe

__all__ = ["KNOWN_SIZES", "Plan", "PlannedPhase", "Sizes", "find_sizes", "plan_stage", "plan_student", "sizes_of"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how many weights a model has.

    Args:
        family: model type.
        hidden: width of the decoder.
        intermediate: width inside its MLPs.
        layers: of the decoder.
        heads: query heads.
        kv_heads: key heads.
        head_dim: of each.
        vocabulary: tokens.
        tied: whether lm_head is the token table.
        vision: weights of the vision encoder and projector.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    vision: int

    @property
    def attention_in(self) -> int:
        """Weights of queries, keys and the norms before them in one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        extra = queries + keys if self.family == "qwen2_5_vl" else 2 * self.head_dim
        return self.hidden * (queries + keys) + extra + self.hidden

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        values = self.hidden * keys + (keys if self.family == "qwen2_5_vl" else 0)
        return self.attention_in + values + queries * self.hidden + 3 * self.hidden * self.intermediate + self.hidden

    @property
    def table(self) -> int:
        """Weights of the token table."""
        return self.vocabulary * self.hidden

    @property
    def base(self) -> int:
        """Weights of the base model."""
        tables = self.table * (1 if self.tied else 2)
        return self.layers * self.layer + self.hidden + tables + self.vision

    def trained(self, stage: str, branch_layers: int) -> dict[Part, int]:
        """Weights that a stage trains, by part."""
        counts: dict[Part, int] = {
            "region": (branch_layers - 1) * self.layer + self.attention_in,
            "gate": branch_layers * self.layer + self.hidden + 1,
            "layers": self.layers * self.layer,
            "norm": self.hidden,
            "lm_head": self.table,
        }
        return {part: counts[part] for part in STAGES[stage].trains}

    def lora_layer(self, rank: int) -> int:
        """LoRA weights of all linear maps of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        maps = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        maps += [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return sum(rank * (a + b) for a, b in maps)


KNOWN_SIZES: dict[str, Sizes] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Sizes("qwen2_5_vl", 2048, 11008, 36, 16, 2, 128, 151936, True, 668_684_288),
    "Qwen/Qwen2.5-VL-7B-Instruct": Sizes("qwen2_5_vl", 3584, 18944, 28, 28, 4, 128, 152064, False, 676_550_144),
    "Qwen/Qwen3-VL-4B-Instruct": Sizes("qwen3_vl", 2560, 9728, 36, 32, 8, 128, 151936, True, 415_347_712),
    "Qwen/Qwen3-VL-8B-Instruct": Sizes("qwen3_vl", 4096, 12288, 36, 32, 8, 128, 151936, False, 576_388_336),
}
"""From the published configs."""


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """One phase in figures: a stage, or "sft" or "grpo" of a student.

    Args:
        phase: its name.
        steps: optimiser steps; None while the data do not exist.
        batch: units per step.
        unit: "samples", "images" or "questions".
        forwards: forward passes per step: of each process in a stage, of all processes together for a student.
        learning_rate: peak.
    """

    phase: str
    steps: int | None
    batch: int
    unit: str
    forwards: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in figures.

    Args:
        base_weights: of the base model.
        trained: weights that train, by part.
        memory_gb: weights, gradients and optimiser state in GB (10^9 bytes), without activations.
        samples: labels or questions to train on; None while the data do not exist, as the next three.
        images: of a student's data.
        negatives: questions of a student's data whose target is absent.
        held_out: questions of a student's data to validate with.
        phases: in order.
    """

    base_weights: int
    trained: dict[str, int]
    memory_gb: float
    samples: int | None
    images: int | None
    negatives: int | None
    held_out: int | None
    phases: tuple[PlannedPhase, ...]

    @property
    def trained_weights(self) -> int:
        """All weights that train."""
        return sum(self.trained.values())


def plan_stage(recipe: StageRecipe, stage: str, sizes: Sizes, samples: int | None, *, processes: int = 1) -> Plan:
    """The figures of a stage.

    Args:
        recipe: its settings.
        stage: row of the stage table.
        sizes: of the base.
        samples: to train on; None if not known.
        processes: that share a batch.
    """
    from qzoom.training.loop import steps_of

    trained = {str(part): count for part, count in sizes.trained(stage, recipe.branch_layers).items()}
    lora = bool(recipe.lora_rank) and stage == "answers"
    if lora:
        trained = {"layers": sizes.layers * sizes.lora_layer(recipe.lora_rank)}
    moving = sum(trained.values())
    frozen = sizes.base - (moving if stage == "answers" and not lora else 0)
    memory = _memory_gb(frozen, moving, half=frozen_in_bfloat16(recipe, stage))
    steps = steps_of(recipe, samples) if samples else recipe.steps or None
    forwards = math.ceil(recipe.batch / processes / recipe.micro_batch)
    phase = PlannedPhase(stage, steps, recipe.batch, "samples", forwards, recipe.learning_rate)
    return Plan(sizes.base, trained, memory, samples, None, None, None, (phase,))


def plan_student(recipe: StudentRecipe) -> Plan:
    """The figures of a student's run; data that do not exist yet are no mistake.

    Raises:
        CheckpointError: a base that is neither on this machine nor in the table of known ones.
        DataError: data that cannot be used.
    """
    from qzoom.training.student.data import read_split
    from qzoom.training.student.run import steps_of_phase

    sizes, lora = find_sizes(recipe.base), bool(recipe.lora_rank)
    trained = {"model": sizes.base - (0 if recipe.vision else sizes.vision)}
    if lora:
        # the vision tower adds little to the decoder's maps
        trained = {"layers": sizes.layers * sizes.lora_layer(recipe.lora_rank)}
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
        phases.append(
            PlannedPhase(name, steps, settings.batch, unit, total // settings.micro_batch, settings.learning_rate)
        )
    train = split.train if split is not None else None
    return Plan(
        sizes.base,
        trained,
        memory,
        None if train is None else len(train),
        None if train is None else len({q.picture for q in train}),
        None if train is None else sum(q.negative for q in train),
        None if split is None else len(split.validation),
        tuple(phases),
    )


def _memory_gb(frozen: int, trained: int, *, half: bool) -> float:
    """GB of frozen weights, and of trained ones with gradient and AdamW's state in float32."""
    return (frozen * (2 if half else 4) + trained * (4 + 4 + 8)) / 1e9


def find_sizes(base: str) -> Sizes:
    """Sizes of a base by folder, embedded name or hub id.

    Raises:
        CheckpointError: neither on this machine nor in the table.
    """
    from qzoom.checkpoints.format import CONFIG_FILE, read_adapter_config
    from qzoom.checkpoints.hub import find_source

    if base in KNOWN_SIZES:
        return KNOWN_SIZES[base]
    known = [(name, sizes) for name, sizes in KNOWN_SIZES.items() if base in SAME_SIZES.get(name, ())]
    if known:
        return known[0][1]
    source = find_source(base, None)
    folder = source.folder
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        return find_sizes(str(Path(folder, read_adapter_config(folder).base.id)))
    return sizes_of(folder)


SAME_SIZES = {
    "Qwen/Qwen2.5-VL-7B-Instruct": ("inclusionAI/ZwZ-7B",),
    "Qwen/Qwen3-VL-4B-Instruct": ("inclusionAI/ZwZ-4B",),
    "Qwen/Qwen3-VL-8B-Instruct": ("inclusionAI/ZwZ-8B",),
}
"""Models that differ from a known base in their weights only."""


def sizes_of(folder: Path) -> Sizes:
    """Sizes out of a model folder's config.json; the vision part is counted on a model without storage.

    Raises:
        CheckpointError: no config of a family that is supported.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no model config that can be read; name a model folder.") from error
    text = config.get_text_config()
    if config.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        raise ConfigError(f"Models of type {config.model_type!r} have no training plan.")
    return Sizes(
        family=config.model_type,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        vision=sum(weight.numel() for weight in model.model.visual.parameters()),
    )
