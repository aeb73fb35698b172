"""FSDP and DeepSpeed, where weights and optimiser state lie in pieces on several GPUs. Not run by this project's tests.

FSDP (version 2 only) is gathered for checkpoints and for the result, so its files are those of a run in one process.
DeepSpeed keeps its state in pickles of its own, which qzoom does not write: such a run has no checkpoints on the way.
The configs are in `recipes/accelerate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzoom.errors import ConfigError
from qzoom.training.stages import StageRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["check_sharding", "gather", "restore_optimiser", "uses_deepspeed", "uses_fsdp"]


States = dict[str, dict[str, Tensor]]


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether FSDP holds the weights in pieces."""
    return str(accelerator.distributed_type.value) == "FSDP"


def uses_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed steps the optimiser."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def check_sharding(accelerator: Accelerator, recipe: StageRecipe) -> None:
    """Refuse what cannot work, and tell DeepSpeed what it cannot know.

    Raises:
        ConfigError: FSDP of version 1; DeepSpeed with a batch in several parts.
    """
    if uses_fsdp(accelerator) and not accelerator.is_fsdp2:
        raise ConfigError("FSDP runs in version 2 only; set fsdp_version: 2 in accelerate's config.")
    if uses_deepspeed(accelerator):
        if recipe.micro_batch * accelerator.num_processes != recipe.batch:
            raise ConfigError(
                f"DeepSpeed takes a batch in one part: with {accelerator.num_processes} processes and a batch of "
                f"{recipe.batch} set micro_batch to {max(1, recipe.batch // accelerator.num_processes)}."
            )
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = recipe.micro_batch
        config["gradient_accumulation_steps"] = 1
        config["gradient_clipping"] = recipe.clip


def gather(module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], States]:
    """Whole weights and optimiser state of an FSDP module by its own names, on the CPU; every process must call it.

    Args:
        module: wrapped by FSDP, version 2.
        optimiser: torch's own, over the module's trained weights.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(module, options=options)
    found: Any = get_optimizer_state_dict(module, optimiser, options=options)
    # step counters are the optimiser's own, not copies
    states = {
        name: {key: value.clone() if value.ndim == 0 else value for key, value in state.items()}
        for name, state in found.get("state", {}).items()
    }
    return weights, states


def restore_optimiser(
    module: nn.Module, optimiser: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Give an FSDP module's optimiser the whole state of a checkpoint; every process must call it with the same.

    Args:
        module: wrapped by FSDP, version 2.
        optimiser: torch's own; its state is replaced.
        states: AdamW's state by the module's names.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    whole: Any = get_optimizer_state_dict(module, optimiser, options=options)
    whole["state"] = {name: dict(state) for name, state in states.items()}
    set_optimizer_state_dict(module, optimiser, whole, options=options)
