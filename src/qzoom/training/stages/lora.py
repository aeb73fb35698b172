"""LoRA for stage 2: small matrices beside the decoder's linear maps, by peft, merged into the weights at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qzoom.engine.state import Engine

__all__ = ["add_lora", "merge_lora"]

_MAPS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def add_lora(engine: Engine, rank: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """Put LoRA matrices into the decoder's layers and freeze everything else.

    Args:
        engine: its model is changed in place.
        rank: of the matrices; the scale is 2 (alpha is twice the rank).

    Returns:
        peft's wrapper, for `merge_lora`, and the weights that train, by name.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora_rank needs the package peft; install it with: pip install 'qzoom[train]'.") from error
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.requires_grad_(False)
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({_MAPS})",
    )
    wrapped = get_peft_model(engine.backbone.model, settings)
    weights = {f"lora.{name}": weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    return wrapped, weights


def merge_lora(wrapped: Any) -> None:
    """Add the matrices to the weights they stand beside, and take them out of the model."""
    wrapped.merge_and_unload()
