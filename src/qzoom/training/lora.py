"""LoRA for stage 2: small matrices beside the decoder's linear maps, by peft; they travel in the adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.lora import LoraWeights, add_to_backbone, maps_digest, weight_in
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qzoom.engine.state import Engine

__all__ = ["add_lora", "finish_lora"]


_MAPS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def add_lora(engine: Engine, rank: int) -> tuple[Any, dict[str, nn.Parameter]]:
    """Put LoRA matrices into the decoder's layers and freeze everything else.

    Args:
        engine: its model is changed in place.
        rank: of the matrices; the scale is 2 (alpha is twice the rank).

    Returns:
        peft's wrapper, for `finish_lora`, and the weights that train, by name.

    Raises:
        ConfigError: peft is not installed, or the model has LoRA weights already.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora_rank needs the package peft; install it with: pip install 'qzoom[train]'.") from error
    if engine.backbone.lora is not None:
        raise ConfigError(
            "The base has LoRA weights already, and further ones cannot be put beside them; merge them with "
            "`qzoom convert` and train that model, or train all weights with lora_rank: 0."
        )
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


def finish_lora(engine: Engine, wrapped: Any, base: str) -> None:
    """Take the matrices out of the model and add them to its weights as loading an adapter does.

    Args:
        engine: its backbone is changed in place and knows its LoRA weights from then on.
        wrapped: from `add_lora`.
        base: hub id or folder of the base, noted in PEFT's settings.
    """
    from peft import get_peft_model_state_dict

    tensors = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    made = wrapped.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    settings = json.loads(json.dumps(made, default=_plain))
    wrapped.unload()
    targets = LoraWeights("", settings, tensors).targets
    backbone = engine.backbone
    digest = maps_digest(targets, lambda target: weight_in(backbone, target, base))
    add_to_backbone(backbone, LoraWeights(digest, settings, tensors), base)


def _plain(value: Any) -> Any:
    """Sets and enumerations as JSON has them."""
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
