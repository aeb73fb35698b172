"""Qwen3-VL: DeepStack features after the first decoder layers, q and k norms, interleaved M-RoPE."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from qzoom.backbones.qwen_vl import QwenVLBackbone

__all__ = ["Qwen3VLBackbone"]


class Qwen3VLBackbone(QwenVLBackbone):
    """`Qwen3VLForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "qwen3_vl"
    default_sink: ClassVar[str] = "first_token"
    rotate = staticmethod(apply_rotary_pos_emb)
