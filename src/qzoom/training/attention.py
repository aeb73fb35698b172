"""Plain matrix-product attention for training small models on a CPU.

At a few dozen tokens a sequence the fused kernels' backward pass costs more than the arithmetic. These two functions
are registered with transformers under names of our own and chosen for the model that trains; the weights and the
result are the same (a test compares them with the stock kernels). `attention_logits` gives what chosen heads look at,
for guides that teach them where to look.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

__all__ = ["TEXT_ATTENTION", "VISION_ATTENTION", "attention_logits", "use_plain_attention"]

TEXT_ATTENTION = "qzoom_plain"
VISION_ATTENTION = "flash_attention_qzoom_packed"


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """(B, heads, S, d) attention; `mask` is boolean, true = attend, broadcastable to (B, heads, S, S)."""
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)


def _text(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention with grouped keys, the groups folded into the query rows instead of repeating the keys."""
    batch, heads, length, width = query.shape
    groups = module.num_key_value_groups
    folded = query.reshape(batch, heads // groups, groups * length, width)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    out = _plain(folded, key, value, mask, scaling)
    return out.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def _vision(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside every picture of a packed sequence (1, heads, S, d); runs of equal size share one product."""
    assert cu_seq_lens_q is not None
    edges = cu_seq_lens_q.tolist()
    sizes = [stop - start for start, stop in itertools.pairwise(edges)]
    outputs, index = [], 0
    while index < len(sizes):
        size, last = sizes[index], index
        while last < len(sizes) and sizes[last] == size:
            last += 1
        part = slice(edges[index], edges[last])
        stacked = [
            tensor[0, :, part].unflatten(1, (last - index, size)).transpose(0, 1) for tensor in (query, key, value)
        ]
        outputs.append(_plain(stacked[0], stacked[1], stacked[2], None, scaling).transpose(1, 2).flatten(0, 1))
        index = last
    return torch.cat(outputs)[None], None


def use_plain_attention(model: Any) -> None:
    """Let a Qwen3-VL model compute attention this way (4-D boolean masks only)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(TEXT_ATTENTION, _text)
    AttentionInterface.register(VISION_ATTENTION, _vision)
    AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
    model.config.text_config._attn_implementation = TEXT_ATTENTION
    model.config.vision_config._attn_implementation = VISION_ATTENTION


def attention_logits(
    layer: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor,
    places: torch.Tensor,
    heads: tuple[int, ...],
) -> torch.Tensor:
    """Scaled query-key products of chosen heads, (n, heads, S) float32, for the n queries at (rows, places)."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    attention = layer.self_attn
    groups = attention.num_key_value_groups
    normed = layer.input_layernorm(hidden)
    batch, length, _ = normed.shape
    keys = attention.k_norm(attention.k_proj(normed).view(batch, length, -1, attention.head_dim))
    queries = attention.q_norm(attention.q_proj(normed[rows, places]).view(len(rows), 1, -1, attention.head_dim))
    cos, sin = rotary
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=2)
    queries, _ = apply_rotary_pos_emb(
        queries, queries, cos[rows, places][:, None], sin[rows, places][:, None], unsqueeze_dim=2
    )
    picked = [
        torch.einsum("nd,nsd->ns", queries[:, 0, head].float(), keys[:, :, head // groups].float()[rows])
        for head in heads
    ]
    return torch.stack(picked, dim=1) * attention.scaling
