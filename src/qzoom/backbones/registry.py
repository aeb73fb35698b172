"""Model type -> backbone class. A new family is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from qzoom.backbones.base import Backbone, ModelSizes
from qzoom.errors import CheckpointError

FAMILIES: dict[str, str] = {
    "qwen2_5_vl": "qzoom.backbones.qwen_vl:Qwen2_5VLBackbone",
    "qwen3_vl": "qzoom.backbones.qwen_vl:Qwen3VLBackbone",
    "llava": "qzoom.backbones.llava:LlavaBackbone",
    "llava_llama": "qzoom.backbones.llava:LlavaBackbone",
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
    return backbone_class(model.config.model_type)(model, tokenizer, image_processor, chat_template)


def backbone_class(model_type: str) -> type[Backbone]:
    """The backbone class of a model type.

    Raises:
        CheckpointError: no backbone for it.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"Models of type {model_type!r} are not supported; supported types: {', '.join(FAMILIES)}."
        )
    module, name = FAMILIES[model_type].split(":")
    found: type[Backbone] = getattr(importlib.import_module(module), name)
    return found


def published_sizes() -> dict[str, ModelSizes]:
    """Sizes of the published bases of every family, by hub id."""
    return {name: sizes for kind in FAMILIES for name, sizes in backbone_class(kind).published.items()}
