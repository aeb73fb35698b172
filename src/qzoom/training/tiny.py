"""The embedded model's architecture and its first weights: Qwen3-VL, unforked, at a size that two cores can train.

`TinyArchitecture` states the sizes; `build_tiny` makes the model and draws its weights. The usual draw (standard
deviation 0.02 everywhere) leaves a small model at chance for tens of thousands of pictures, so weights are drawn with
the inverse root of their fan-in instead and what is added to the residual stream starts small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

__all__ = ["PATCH_PX", "TOKEN_PX", "TinyArchitecture", "build_tiny", "tiny_config"]

PATCH_PX = 16
TOKEN_PX = 32
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")


@dataclass(frozen=True, slots=True)
class TinyArchitecture:
    """Sizes of the model; the vision side feeds DeepStack once, after `vision_deepstack` of its blocks."""

    vision_width: int = 160
    vision_depth: int = 4
    vision_heads: int = 4
    vision_mlp: int = 480
    vision_deepstack: int = 1
    vision_positions: int = 256
    text_width: int = 192
    text_depth: int = 6
    text_heads: int = 6
    text_kv_heads: int = 3
    text_head_dim: int = 32
    text_mlp: int = 512
    rope_theta: float = 1000.0


def tiny_config(arch: TinyArchitecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The stock configuration for these sizes and this tokenizer."""
    from transformers import Qwen3VLConfig

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    third = arch.text_head_dim // 2 // 3
    sections = [arch.text_head_dim // 2 - 2 * third, third, third]
    config = Qwen3VLConfig(
        vision_config={
            "depth": arch.vision_depth,
            "hidden_size": arch.vision_width,
            "intermediate_size": arch.vision_mlp,
            "num_heads": arch.vision_heads,
            "patch_size": PATCH_PX,
            "spatial_merge_size": TOKEN_PX // PATCH_PX,
            "temporal_patch_size": 2,
            "out_hidden_size": arch.text_width,
            "num_position_embeddings": arch.vision_positions,
            "deepstack_visual_indexes": [arch.vision_deepstack],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": arch.text_width,
            "intermediate_size": arch.text_mlp,
            "num_hidden_layers": arch.text_depth,
            "num_attention_heads": arch.text_heads,
            "num_key_value_heads": arch.text_kv_heads,
            "head_dim": arch.text_head_dim,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": arch.rope_theta,
                "mrope_section": sections,
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    return config


def build_tiny(
    arch: TinyArchitecture, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3VLForConditionalGeneration:
    """The model with its first weights, float32, drawn from `seed` alone."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(arch, tokenizer))
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                _draw(name, weight)
            model.model.language_model.norm.weight.fill_(0.5)
    model.generation_config.eos_token_id = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))  # type: ignore[arg-type]
    model.generation_config.pad_token_id = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))  # type: ignore[arg-type]
    model.generation_config.do_sample = False
    return model


def _draw(name: str, weight: object) -> None:
    """Fill one weight: fan-in scaling, small residual outputs, wide position and token tables."""
    import torch

    assert isinstance(weight, torch.nn.Parameter)
    if "pos_embed" in name:
        weight.normal_(0.0, 0.5)
    elif "embed_tokens" in name:
        weight.normal_(0.0, 0.3)
    elif weight.ndim >= 2:
        std = 1.0 / math.sqrt(weight[0].numel())
        if name.endswith(_RESIDUAL_OUTPUTS):
            std *= 0.3
        weight.normal_(0.0, std)
    elif name.endswith("bias"):
        weight.zero_()
