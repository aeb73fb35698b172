"""Qwen3.5, dense and with experts: three linear-attention layers to one with full attention, no DeepStack.

A full-attention layer's queries come with an output gate, its norms are centred on zero and only a quarter of each
head is rotated. A linear-attention layer keeps a state instead of keys; it runs row by row, from cut to cut, and its
state is kept at every cut (`packed.Rows`, `engine.cache.LinearState`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Rotary, VisionShape
from qzoom.backbones.packed import Rows
from qzoom.backbones.qwen_vl import QwenVLBackbone
from qzoom.errors import ConfigError


def _is_linear(layer: nn.Module) -> bool:
    return hasattr(layer, "linear_attn")


class Qwen3_5Backbone(QwenVLBackbone):
    """`Qwen3_5ForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "qwen3_5"
    transformers: ClassVar[str] = "5.23"
    unquantized: ClassVar[tuple[str, ...]] = (
        *QwenVLBackbone.unquantized,
        "in_proj_a",
        "in_proj_b",
        "shared_expert_gate",
    )
    decoder_maps: ClassVar[str] = r"(self_attn|mlp|linear_attn|mlp\.shared_expert)\.(\w+_proj|in_proj_(qkv|z))"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Those with full attention."""
        return tuple(i for i, layer in enumerate(self.layers) if not _is_linear(layer))

    def layer_index(self, layer: nn.Module) -> int:
        """See `Backbone.layer_index`."""
        mixer: Any = layer.linear_attn if _is_linear(layer) else layer.self_attn
        return int(mixer.layer_idx)

    def run_layer(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, mask: Tensor | None, cache: Any) -> Tensor:
        """See `Backbone.run_layer`; a linear-attention layer looks at no mask."""
        if not _is_linear(layer):
            return super().run_layer(layer, hidden, rotary, mask, cache)
        if not isinstance(cache, Rows):
            return super().run_layer(layer, hidden, rotary, None, cache)
        index, outputs = self.layer_index(layer), []
        for own, stretches in cache.pieces():
            for piece, length, cut in stretches:
                outputs.append(super().run_layer(layer, hidden[:, piece], rotary, None, own))
                own.snapshot(index, length, keep=cut)
        return torch.cat(outputs, dim=1)

    def run_last(self, layer: nn.Module, hidden: Tensor, rotary: Rotary, rows: Rows) -> Tensor:
        """See `Backbone.run_last`; a linear-attention layer must run over all tokens."""
        if not _is_linear(layer):
            return super().run_last(layer, hidden, rotary, rows)
        return self.run_layer(layer, hidden, rotary, None, rows)[:, torch.tensor(rows.new).cumsum(0) - 1]

    def query(self, layer: nn.Module, hidden: Tensor, rotary: Rotary) -> Tensor:
        """See `Backbone.query`; the half of each projected head that gates the output is left out."""
        attention: Any = layer.self_attn
        projected = attention.q_proj(layer.input_layernorm(hidden))  # type: ignore[operator]
        both = projected.unflatten(-1, (-1, 2, attention.head_dim))
        heads = attention.q_norm(both[..., 0, :]).transpose(1, 2)
        return self._rotate(heads, heads, *rotary)[0]

    def vision_shape(self) -> VisionShape:
        """See `Backbone.vision_shape`; the decoder's FLOPs are not stated."""
        raise ConfigError(f"FLOPs cannot be counted for models of type {self.family!r}: layers of two kinds.")


class Qwen3_5MoeBackbone(Qwen3_5Backbone):
    """`Qwen3_5MoeForConditionalGeneration`, unforked; LoRA goes on attention and shared experts."""

    family: ClassVar[str] = "qwen3_5_moe"
