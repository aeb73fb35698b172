"""Model type -> backbone class. A new family is one file and one line here."""

from __future__ import annotations

import importlib
from typing import Any

from qzoom.backbones.base import Backbone, ModelSizes
from qzoom.errors import CheckpointError

FAMILIES: dict[str, str] = {
    "qwen2_5_vl": "qzoom.backbones.qwen_vl:Qwen2_5VLBackbone",
    "qwen3_vl": "qzoom.backbones.qwen_vl:Qwen3VLBackbone",
    "qwen3_vl_moe": "qzoom.backbones.qwen_vl:Qwen3VLMoeBackbone",
    "qwen3_5": "qzoom.backbones.qwen_hybrid:Qwen3_5Backbone",
    "qwen3_5_moe": "qzoom.backbones.qwen_hybrid:Qwen3_5MoeBackbone",
    "glm4v": "qzoom.backbones.glm_vl:Glm4vBackbone",
    "glm46v": "qzoom.backbones.glm_vl:Glm46vBackbone",
    "llava": "qzoom.backbones.llava:LlavaBackbone",
    "llava_llama": "qzoom.backbones.llava:LlavaBackbone",
}


def build_backbone(model: Any, tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> Backbone:
    """Wrap a loaded transformers model (CheckpointError: no backbone for the model's type). `model`: any model whose
    `config.model_type` is in `FAMILIES`. `chat_template`: overrides the tokenizer's own template."""
    return backbone_class(model.config.model_type)(model, tokenizer, image_processor, chat_template)


def backbone_class(model_type: Any, where: str = "") -> type[Backbone]:
    """The backbone class of a model type (CheckpointError: no backbone for it, or one that needs a later release of
    transformers)."""
    import transformers
    from packaging.version import Version

    if not isinstance(model_type, str) or model_type not in FAMILIES:
        kind = f"of type {model_type!r}"
        start = f"{where} is a model {kind}, which is" if where else f"Models {kind} are"
        raise CheckpointError(
            f"{start} not supported; supported types are {', '.join(FAMILIES)}, and docs/port-a-backbone.md says how "
            "to add one."
        )
    module, name = FAMILIES[model_type].split(":")
    backbone: type[Backbone] = getattr(importlib.import_module(module), name)
    if backbone.transformers and Version(transformers.__version__) < Version(backbone.transformers):
        raise CheckpointError(
            f"{where or 'The model'} is of type {model_type!r}, which needs transformers {backbone.transformers} or "
            f"newer, and {transformers.__version__} is installed; upgrade it."
        )
    return backbone


def published_sizes() -> dict[str, ModelSizes]:
    """Sizes of the published bases of every family, by hub id."""
    return {name: sizes for kind in FAMILIES for name, sizes in backbone_class(kind).published.items()}
