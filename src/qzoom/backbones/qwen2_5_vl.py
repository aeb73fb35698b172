"""Qwen2.5-VL: windowed vision attention, biased projections, sectioned M-RoPE."""

from __future__ import annotations

from typing import ClassVar

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from qzoom.backbones.qwen_vl import QwenVLBackbone

__all__ = ["Qwen2_5VLBackbone"]


class Qwen2_5VLBackbone(QwenVLBackbone):
    """`Qwen2_5_VLForConditionalGeneration`, unforked."""

    family: ClassVar[str] = "qwen2_5_vl"
    default_sink: ClassVar[str] = "corner"
    rotate = staticmethod(apply_rotary_pos_emb)
