"""Sequences of different lengths side by side, without padding: (1, all their tokens, hidden).

Linear maps and norms take the packed tokens as they are. Attention must stay within each sequence: `Rows` stands where
a decoder layer expects its cache and hands every sequence its own, and `PACKED` is an attention implementation,
registered with transformers, that takes what `Rows` returns apart again. With anything else it is transformers' own
sdpa, so the model's own forward pass and training are as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PACKED = "qzoom_packed"


@dataclass(frozen=True, slots=True)
class PackedKeys:
    """Keys and values of every sequence, and how many of the packed queries are its own."""

    new: tuple[int, ...]
    pairs: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """The sequences of a packed batch, as the cache of a decoder layer."""

    caches: Sequence[Any]
    new: tuple[int, ...]  # packed tokens of each
    past: tuple[int, ...]  # tokens that each cache holds already
    # lengths at which each sequence may be cut later, ascending; layers that keep a state take snapshots there
    cuts: Sequence[Sequence[int]]
    mask: Tensor | None = None  # additive (1, 1, queries, keys) for a single sequence whose attention is not `PACKED`

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Append packed keys and values (1, kv_heads, tokens, head_dim) to the caches; all of them for `PACKED`."""
        if self.mask is not None:
            return self.caches[0].update(key, value, layer_idx)
        if len(self.caches) == 1:
            return PackedKeys(self.new, (self.caches[0].update(key, value, layer_idx),)), None
        parts = zip(self.caches, key.split(self.new, dim=2), value.split(self.new, dim=2), strict=True)
        return PackedKeys(self.new, tuple(cache.update(k, v, layer_idx) for cache, k, v in parts)), None

    def last(self) -> tuple[Rows, Rows, Tensor | slice, Tensor | slice]:
        """All but the last token of each sequence, the last ones, and the packed indices of both."""
        earlier: Tensor | slice = slice(0, self.new[0] - 1)
        ends: Tensor | slice = slice(self.new[0] - 1, None)
        if len(self.new) > 1:
            ends = torch.tensor(self.new).cumsum(0) - 1
            earlier = torch.ones(sum(self.new), dtype=torch.bool).index_fill(0, ends, value=False).nonzero()[:, 0]
        before = Rows(self.caches, tuple(n - 1 for n in self.new), self.past, self.cuts)
        lengths = tuple(past + new - 1 for past, new in zip(self.past, self.new, strict=True))
        mask = None if self.mask is None else self.mask[:, :, -1:]
        return before, Rows(self.caches, (1,) * len(self.new), lengths, self.cuts, mask), earlier, ends

    def pieces(self) -> list[tuple[Any, list[tuple[slice, int, bool]]]]:
        """For layers that keep a state: each sequence's cache and its stretches from cut to cut.

        A stretch is its slice of the packed tokens, the sequence's length after it, and whether it may be cut there.
        """
        out, offset = [], 0
        for cache, new, past, cuts in zip(self.caches, self.new, self.past, self.cuts, strict=True):
            inner = [cut for cut in cuts if past < cut <= past + new]
            stops = sorted({*inner, past + new})
            stretches = [
                (slice(offset + start - past, offset + stop - past), stop, stop in inner)
                for start, stop in zip([past, *stops[:-1]], stops, strict=True)
            ]
            out.append((cache, stretches))
            offset += new
        return out


def use_packed_attention(text_config: Any) -> bool:
    """Choose `PACKED` for a decoder whose attention is sdpa; returns whether it is chosen now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if text_config._attn_implementation == "sdpa":
        AttentionInterface.register(PACKED, _attention)
        AttentionMaskInterface.register(PACKED, sdpa_mask)
        text_config._attn_implementation = PACKED
    return bool(text_config._attn_implementation == PACKED)


def _attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of packed queries (1, heads, tokens, head_dim) within each sequence: (1, tokens, heads, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(key, PackedKeys):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and len(key.new) > 1:
        out = _variable_length(query, key, options["scaling"])
        if out is not None:
            return out, None
    if len(key.new) == 1:
        (keys, values), (new,) = key.pairs[0], key.new
        return sdpa_attention_forward(module, query, keys, values, _mask_for(new, keys, query), **options)
    queries = query.split(key.new, dim=2)
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (keys, _) in enumerate(key.pairs):
        alike.setdefault((key.new[i], keys.shape[2]), []).append(i)
    outputs: list[Any] = [None] * len(queries)
    for (new, _), members in alike.items():
        stacked = _stacked([queries[i] for i in members])
        keys, values = (_stacked([key.pairs[i][side] for i in members]) for side in (0, 1))
        out, _ = sdpa_attention_forward(module, stacked, keys, values, _mask_for(new, keys, query), **options)
        for i, one in zip(members, out.split(1), strict=True):
            outputs[i] = one
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], None


def _stacked(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _mask_for(new: int, keys: Tensor, query: Tensor) -> Tensor | None:
    """The mask of `new` queries over these keys; None where they need none, or are all of the sequence."""
    total = keys.shape[2]
    return None if new in (1, total) else _lower_right(new, total, query.dtype, query.device)


@lru_cache(maxsize=2)
@torch.inference_mode(mode=False)
def _lower_right(new: int, total: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive (1, 1, new, total): a query sees every key up to itself, the last one all of them.

    Made once for all layers of a stack, in the form to which attention brings a boolean mask in each of them, and fit
    for gradients.
    """
    keys = torch.arange(total, device=device)
    hidden = keys[None] > torch.arange(total - new, total, device=device)[:, None]
    return torch.zeros(new, total, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[None, None]


def _variable_length(query: Tensor, key: PackedKeys, scaling: float) -> Tensor | None:
    """One call of torch's variable-length attention where no sequence has a past; None where it does not apply.

    Its kernels need an Ampere GPU or a newer one and heads of 8, 16, ... 256 numbers.
    """
    totals = [keys.shape[2] for keys, _ in key.pairs]
    width = query.shape[3]
    if list(key.new) != totals or width % 8 or width > 256 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    edges = torch.tensor([0, *totals], device=query.device).cumsum(0).int()
    keys, values = (torch.cat([pair[side][0] for pair in key.pairs], dim=1).transpose(0, 1) for side in (0, 1))
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1).contiguous() for t in (keys, values))
    packed = query[0].transpose(0, 1).contiguous()
    longest = max(totals)
    try:
        out: Any = varlen_attn(packed, keys, values, edges, edges, longest, longest, scale=scaling, window_size=(-1, 0))
    except TypeError:  # earlier releases have other arguments
        return None
    return out[None]
