"""Model type -> backbone class. A new family is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from qzoom.backbones.base import Backbone
from qzoom.errors import CheckpointError

__all__ = ["FAMILIES", "build_backbone"]

FAMILIES: dict[str, str] = {
    "qwen2_5_vl": "qzoom.backbones.qwen2_5_vl:Qwen2_5VLBackbone",
    "qwen3_vl": "qzoom.backbones.qwen3_vl:Qwen3VLBackbone",
}


def build_backbone(model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> Backbone:
    """Wrap a loaded transformers model.

    Args:
        model: any model whose `config.model_type` is in `FAMILIES`.
        tokenizer: its fast tokenizer.
        image_processor: its image processor.
        chat_template: overrides the tokenizer's own template.

    Raises:
        CheckpointError: no backbone for the model's type.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise CheckpointError(f"Models of type {kind!r} are not supported; supported types: {', '.join(FAMILIES)}.")
    module, name = FAMILIES[kind].split(":")
    return getattr(importlib.import_module(module), name)(model, tokenizer, image_processor, chat_template)
