"""What a run would do, by arithmetic: trainable weights, memory and steps, without loading a large model.

Sizes come from the model's own config when it is on this machine, else from the table of the known bases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import CheckpointError, ConfigError
from qzoom.training.stages import STAGES, Part, StageRecipe, frozen_in_bfloat16

__all__ = ["KNOWN_SIZES", "Plan", "Sizes", "find_sizes", "make_plan", "sizes_of"]


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


KNOWN_SIZES: dict[str, Sizes] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Sizes("qwen2_5_vl", 2048, 11008, 36, 16, 2, 128, 151936, True, 668_684_288),
    "Qwen/Qwen2.5-VL-7B-Instruct": Sizes("qwen2_5_vl", 3584, 18944, 28, 28, 4, 128, 152064, False, 676_550_144),
    "Qwen/Qwen3-VL-4B-Instruct": Sizes("qwen3_vl", 2560, 9728, 36, 32, 8, 128, 151936, True, 415_347_712),
    "Qwen/Qwen3-VL-8B-Instruct": Sizes("qwen3_vl", 4096, 12288, 36, 32, 8, 128, 151936, False, 576_388_336),
}
"""From the published configs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run in figures.

    Args:
        stage: row of the stage table.
        base_weights: of the base model.
        trained: weights that train, by part.
        memory_gb: frozen and trained weights, gradients and optimiser state in GB (10^9 bytes), without activations.
        samples: to train on; None when the labels are not there yet.
        steps: optimiser steps; None likewise.
        parts: forward passes of each process per step.
    """

    stage: str
    base_weights: int
    trained: dict[str, int]
    memory_gb: float
    samples: int | None
    steps: int | None
    parts: int

    @property
    def trained_weights(self) -> int:
        """All weights that train."""
        return sum(self.trained.values())


def make_plan(recipe: StageRecipe, stage: str, sizes: Sizes, samples: int | None, processes: int = 1) -> Plan:
    """The figures of a run.

    Args:
        recipe: what is to be done.
        stage: row of the stage table.
        sizes: of the base.
        samples: to train on; None when not known.
        processes: that share a batch.
    """
    from qzoom.training.loop import steps_of

    trained = sizes.trained(stage, recipe.branch_layers)
    if recipe.lora_rank and stage == "answers":
        trained = {"layers": sizes.layers * _lora(sizes, recipe.lora_rank)}
    moving = sum(trained.values())
    frozen_bytes = 2 if frozen_in_bfloat16(recipe, stage) else 4
    frozen = sizes.base - (moving if stage == "answers" and not recipe.lora_rank else 0)
    memory = frozen * frozen_bytes + moving * (4 + 4 + 8)
    steps = steps_of(recipe, samples) if samples else recipe.steps or None
    parts = math.ceil(recipe.batch / processes / recipe.micro_batch)
    return Plan(stage, sizes.base, {str(k): v for k, v in trained.items()}, memory / 1e9, samples, steps, parts)


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


def _lora(sizes: Sizes, rank: int) -> int:
    """LoRA weights of one layer: all its linear maps."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    maps = [(sizes.hidden, queries), (sizes.hidden, keys), (sizes.hidden, keys), (queries, sizes.hidden)]
    maps += [(sizes.hidden, sizes.intermediate)] * 2 + [(sizes.intermediate, sizes.hidden)]
    return sum(rank * (a + b) for a, b in maps)
