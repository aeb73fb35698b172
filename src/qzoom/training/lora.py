"""LoRA during training, by peft; the finished matrices travel in the adapter or are merged into the model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from qzoom.backbones.lora import LoraWeights
from qzoom.checkpoints.lora import add_to_backbone, base_maps_digest
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError
from qzoom.training.run import base_of, without_deprecations


def add_lora(engine: Engine, rank: int, *, vision: bool = False) -> Any:
    """Put LoRA matrices into the decoder's layers, perhaps the vision tower's too, and freeze everything else.

    The engine's model is changed in place and comes back in peft's wrapper. The scale is 2 (alpha is twice the rank)
    (ConfigError: peft is not installed).
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("lora_rank needs the package peft; install it with: pip install 'qzoom[train]'.") from error
    for branch in (engine.gate, engine.region):
        if branch is not None:
            branch.requires_grad_(False)
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=engine.backbone.lora_targets(vision=vision)
    )
    with without_deprecations():
        return get_peft_model(engine.backbone.model, settings)


def finish_lora(engine: Engine, wrapped: Any) -> Engine:
    """Take the matrices of `add_lora` out of the model and add them to its weights, as loading an adapter does.

    The backbone is changed in place; the engine that is returned has the LoRA weights, so that an adapter has them.
    """
    from peft import get_peft_model_state_dict

    base = base_of(engine)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    made = wrapped.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    settings = json.loads(json.dumps(made, default=_plain))
    wrapped.unload()
    targets = LoraWeights("", settings, tensors).targets
    backbone = engine.backbone
    digest = base_maps_digest(backbone, targets, base)
    lora = LoraWeights(digest, settings, tensors)
    add_to_backbone(backbone, lora, base)
    return dataclasses.replace(engine, lora=lora)


def _plain(value: Any) -> Any:
    """Sets and enumerations as JSON has them."""
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
