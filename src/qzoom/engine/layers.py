"""Run decoder layers over rows of different lengths as one batch.

A row is one sample's new tokens plus what its cache already holds. Rows are padded on the left, for new tokens and past
alike, and unpadded afterwards, so that every row's result is what it would be alone:

    keys:     [pad pad P P P | pad N N]        P past, N new; a query sees every non-pad key up to itself
              [P   P   P P P | N   N N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Backbone, Rotary
from qzoom.engine.cache import KVCache


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """New tokens of one sample for a stack of layers.

    Args:
        hidden: (new, hidden) inputs.
        positions: (axes, new).
        cache: what the stack holds of this sample, batch 1.
        past: its length.
        deepstack: (levels, new, hidden) to add after layers 0, 1, ...; None where no new token is visual.
    """

    hidden: Tensor
    positions: Tensor
    cache: KVCache
    past: int
    deepstack: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the stack made of a row.

    Args:
        hidden: (new, hidden), or (1, hidden) when only the last token was wanted.
        cache: past and new keys and values, batch 1.
    """

    hidden: Tensor
    cache: KVCache


def run_layers(
    backbone: Backbone,
    layers: Sequence[nn.Module],
    rows: Sequence[SequenceSlice],
    *,
    first_layer: int | None = None,
    last_token_only: bool = False,
) -> list[RowResult]:
    """Run a stack of layers on every row.

    Args:
        backbone: the family.
        layers: the stack, in order; may be empty.
        rows: one or more samples.
        first_layer: index of the first layer in the decoder, for DeepStack; None for branches, which have none.
        last_token_only: of the last layer compute the output of each row's last new token only (all its keys and
            values are still kept).

    Returns:
        One result per row, in order.
    """
    if not rows:
        return []
    new = [row.hidden.shape[0] for row in rows]
    pasts = [row.past for row in rows]
    if not layers:
        return [RowResult(r.hidden[-1:] if last_token_only else r.hidden, r.cache.fork()) for r in rows]
    hidden = _pad([row.hidden for row in rows], dim=0)
    rotary = backbone.rotary(hidden, _pad([row.positions for row in rows], dim=1).transpose(0, 1))
    deepstack = _pad_deepstack(rows, max(new)) if first_layer is not None else None
    mask = _mask(backbone, new, pasts, hidden)
    cache = KVCache.stack([row.cache for row in rows], pasts)
    for offset, layer in enumerate(layers):
        if last_token_only and offset == len(layers) - 1:
            hidden = _last_token(backbone, layer, hidden, rotary, mask=mask, cache=cache)
        else:
            hidden = backbone.run_layer(layer, hidden, rotary, mask, cache)
        if deepstack is not None and first_layer is not None and first_layer + offset < deepstack.shape[1]:
            hidden = hidden + deepstack[:, first_layer + offset]
    return [_unpack(i, hidden, cache, new, pasts) for i in range(len(rows))]


def decode_mask(backbone: Backbone, pads: Sequence[int], total: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask (batch, 1, 1, total) for one new token a row; None without padding.

    Args:
        backbone: for the device.
        pads: padding positions on the left of each row.
        total: keys after appending the new token.
        dtype: of the hidden states.
    """
    if not any(pads):
        return None
    keys = torch.arange(total, device=backbone.device)
    allowed = keys[None] >= torch.tensor(list(pads), device=backbone.device)[:, None]
    return _additive(allowed[:, None, None], dtype)


def _last_token(
    backbone: Backbone, layer: nn.Module, hidden: Tensor, rotary: Rotary, *, mask: Tensor | None, cache: KVCache
) -> Tensor:
    """A layer's output (batch, 1, hidden) for the last token; earlier ones give keys and values only."""
    if hidden.shape[1] > 1:
        earlier = (rotary[0][:, :-1], rotary[1][:, :-1])
        keys, values = backbone.key_value(layer, hidden[:, :-1], earlier)
        cache.update(keys, values, layer.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]
    last = (rotary[0][:, -1:], rotary[1][:, -1:])
    return backbone.run_layer(layer, hidden[:, -1:], last, None if mask is None else mask[:, :, -1:], cache)


def _mask(backbone: Backbone, new: list[int], pasts: list[int], hidden: Tensor) -> Tensor | None:
    """Additive mask (batch, 1, queries, keys); None when the attention kernel's own causal mask is right."""
    queries, past = max(new), max(pasts)
    ragged = min(new) != queries or min(pasts) != past
    if not ragged and (queries == 1 or (past == 0 and backbone.text_config._attn_implementation == "sdpa")):
        return None
    device = hidden.device
    keys = torch.arange(past + queries, device=device)
    own = torch.arange(queries, device=device) + past
    allowed = (keys[None] <= own[:, None])[None]
    if ragged:
        pad_past = torch.tensor([past - p for p in pasts], device=device)[:, None, None]
        pad_new = torch.tensor([queries - n for n in new], device=device)[:, None, None]
        valid = torch.where(keys < past, keys >= pad_past, keys - past >= pad_new)
        # padding queries see themselves, so that no row of the softmax is empty
        allowed = (allowed & valid) | (keys[None] == own[:, None])[None]
    return _additive(allowed[:, None], hidden.dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def _pad(tensors: list[Tensor], dim: int) -> Tensor:
    """Stack, padded with zeros on the left of `dim`; whole and fractional positions become fractional together."""
    if any(t.dtype != tensors[0].dtype for t in tensors):
        tensors = [t.float() for t in tensors]
    longest = max(t.shape[dim] for t in tensors)
    padded = []
    for tensor in tensors:
        shape = list(tensor.shape)
        shape[dim] = longest - shape[dim]
        padded.append(torch.cat([tensor.new_zeros(shape), tensor], dim=dim) if shape[dim] else tensor)
    return torch.stack(padded)


def _pad_deepstack(rows: Sequence[SequenceSlice], queries: int) -> Tensor | None:
    """(batch, levels, queries, hidden), zeros where nothing is added; None when no row has any."""
    template = next((row.deepstack for row in rows if row.deepstack is not None), None)
    if template is None:
        return None
    out = template.new_zeros(len(rows), template.shape[0], queries, template.shape[2])
    for i, row in enumerate(rows):
        if row.deepstack is not None:
            out[i, :, queries - row.deepstack.shape[1] :] = row.deepstack
    return out


def _unpack(i: int, hidden: Tensor, cache: KVCache, new: list[int], pasts: list[int]) -> RowResult:
    queries, past = max(new), max(pasts)
    out = hidden[i, -new[i] :] if hidden.shape[1] > 1 else hidden[i]
    if len(new) == 1:
        return RowResult(out, cache)
    pieces = [slice(past - pasts[i], past), slice(past + queries - new[i], past + queries)]
    if pasts[i] == 0:
        pieces = pieces[1:]
    elif new[i] == queries:
        pieces = [slice(past - pasts[i], past + queries)]
    return RowResult(out, cache.row(i, pieces))
