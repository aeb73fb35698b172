"""Plain attention for training small models on a CPU, and the supervision of attention heads.

At a few dozen tokens per sequence the fused kernels' backward pass costs more than the arithmetic, so plain matrix
products are registered with transformers and chosen for as long as a loss is computed; the results are the same. From
256 float32 tokens on, where the scores no longer fit into the cache, torch's kernels do the work.

Supervision raises the share of a head's attention that falls on the region's visual tokens while the answer is written.
The image stays unmarked, as in use. It is an addition of this project; the authors (arXiv 2602.11858) draw the region.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.errors import ConfigError
from qzoom.training.losses import IGNORE

if TYPE_CHECKING:
    from qzoom.training.student.recipe import AttentionSupervision

TEXT_ATTENTION = "qzoom_plain"
VISION_ATTENTION = "flash_attention_qzoom_packed"
_LONG = 256
"""From so many keys on torch's kernels are faster in float32: on a core without AVX-512, both passes take 35 instead of
85 ms (eight sequences of 256 tokens), or 153 instead of 456 (one of 1,350). In bfloat16 they were not measured."""


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(B, heads, S, d) attention; `mask` is boolean, true = attend, broadcastable to (B, heads, S, S)."""
    if key.shape[-2] >= _LONG and key.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)


def _text(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention with grouped keys, the groups folded into the query rows instead of repeating the keys."""
    batch, heads, length, width = query.shape
    groups = module.num_key_value_groups
    folded = query.reshape(batch, heads // groups, groups * length, width)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    out = _attend(folded, key, value, mask, scaling)
    return out.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def _vision(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
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
        outputs.append(_attend(stacked[0], stacked[1], stacked[2], None, scaling).transpose(1, 2).flatten(0, 1))
        index = last
    return torch.cat(outputs)[None], None


def use_plain_attention(model: Any) -> None:
    """Let a model compute attention this way (4-D boolean masks only); see `has_plain_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(TEXT_ATTENTION, _text)
    AttentionInterface.register(VISION_ATTENTION, _vision)
    AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
    model.config.text_config._attn_implementation = TEXT_ATTENTION
    model.config.vision_config._attn_implementation = VISION_ATTENTION


def has_plain_attention(backbone: Backbone) -> bool:
    """Whether plain attention and attention supervision are implemented for a family: those with normalised queries."""
    return all(hasattr(getattr(layer, "self_attn", None), "q_norm") for layer in backbone.layers)


def attention_logits(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor, places: Tensor, *, heads: tuple[int, ...]
) -> Tensor:
    """Scaled query-key products of chosen heads, (n, heads, S) float32, for the n queries at (rows, places)."""
    attention = layer.self_attn
    groups = attention.num_key_value_groups
    normed = layer.input_layernorm(hidden)
    batch, length, _ = normed.shape
    keys = attention.k_norm(attention.k_proj(normed).view(batch, length, -1, attention.head_dim))
    queries = attention.q_norm(attention.q_proj(normed[rows, places]).view(len(rows), 1, -1, attention.head_dim))
    cos, sin = rotary
    keys = _rotated(keys, cos[:, :, None], sin[:, :, None])
    queries = _rotated(queries, cos[rows, places][:, None, None], sin[rows, places][:, None, None])
    picked = [
        torch.einsum("nd,nsd->ns", queries[:, 0, head].float(), keys[:, :, head // groups].float()[rows])
        for head in heads
    ]
    return torch.stack(picked, dim=1) * attention.scaling


def _rotated(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (..., head_dim)."""
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat((-second, first), dim=-1) * sin


@contextlib.contextmanager
def packed_attention(model: Any, inputs: Mapping[str, Any], *, enabled: bool) -> Iterator[None]:
    """Use plain attention inside the block, where enabled and for inputs with a 4-D mask.

    The model is a transformers model or peft's wrapper around one.
    """
    config = model.config
    if not enabled or inputs["attention_mask"].ndim != 4:
        yield
        return
    parts = (config.text_config, config.vision_config)
    before = [part._attn_implementation for part in parts]
    stock = getattr(model, "get_base_model", lambda: model)()
    try:
        use_plain_attention(stock)
        yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part._attn_implementation = name


def check_supervision(backbone: Backbone, supervision: AttentionSupervision) -> None:
    """Refuse a layer, heads or a family that cannot be supervised (ConfigError: it says which)."""
    if not supervision.weight:
        return
    if not has_plain_attention(backbone):
        raise ConfigError(
            f"attention_supervision is not implemented for students of type {backbone.family}; set its weight to 0."
        )
    heads = backbone.text_config.num_attention_heads
    if supervision.layer >= backbone.num_layers:
        raise ConfigError(
            f"attention_supervision: layer {supervision.layer} is outside the student's {backbone.num_layers} layers."
        )
    if max(supervision.heads) >= heads:
        raise ConfigError(
            f"attention_supervision: head {max(supervision.heads)} is outside the student's {heads} heads."
        )


@contextlib.contextmanager
def layer_inputs(layer: Any) -> Iterator[dict[str, Any]]:
    """The inputs of a decoder layer inside the block: "hidden" (B, S, width) and "rotary"."""
    seen: dict[str, Any] = {}

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]
        seen["rotary"] = kwargs["position_embeddings"]

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def supervision_loss(
    layer: Any, inputs: Mapping[str, Any], labels: Tensor, packed: Mapping[str, Tensor], heads: tuple[int, ...]
) -> Tensor:
    """Negative logarithm of the attention on the region: mean over heads, sum over the positions that write an answer.

    Args:
        inputs: of the layer, see `layer_inputs`.
        labels: (B, S), -100 outside the answers.
        packed: `regions` (B, questions, S) and `segment` (B, S) of `collate`; without any region the result is 0.
    """
    regions, segment = packed["regions"], packed["segment"]
    writes = torch.zeros_like(labels, dtype=torch.bool)
    writes[:, :-1] = labels[:, 1:] != IGNORE
    rows, places = writes.nonzero(as_tuple=True)
    targets = regions[rows, segment[rows, places].clamp(min=1) - 1]
    has_region = targets.any(-1)
    if not bool(has_region.any()):
        return torch.as_tensor(inputs["hidden"].sum() * 0.0)
    rows, places, targets = rows[has_region], places[has_region], targets[has_region]
    logits = attention_logits(layer, inputs["hidden"], inputs["rotary"], rows, places, heads=heads)
    logits = logits.masked_fill(~_may_attend(segment, rows, places)[:, None], float("-inf"))
    on_region = logits.masked_fill(~targets[:, None], float("-inf"))
    return (logits.logsumexp(-1) - on_region.logsumexp(-1)).mean(-1).sum()


def _may_attend(segment: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """(n, S): what came before, of the image and of the own question."""
    own = segment[rows, places][:, None]
    before = torch.arange(segment.shape[1], device=segment.device)[None] <= places[:, None]
    return ((segment[rows] == 0) | (segment[rows] == own)) & before
