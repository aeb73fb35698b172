"""Run decoder layers over rows of different lengths as one batch, without padding.

A row is one sample's new tokens plus what its cache already holds. The new tokens of all rows are packed into one
sequence for the linear maps; attention stays within each row (`backbones.packed`), so that every row's result is what
it would be alone:

    packed:   [N N N N | N N | N N N]          one product with each weight matrix
    attention: row by row, over P P P N N N N; rows of equal lengths together
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Backbone
from qzoom.backbones.packed import Rows
from qzoom.engine.cache import KVCache

_CPU_TOKENS = 2048
"""New tokens that a CPU runs packed together: with more, products and activations leave its caches."""


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """New tokens of one sample for a stack of layers."""

    hidden: Tensor  # (new, hidden) inputs
    positions: Tensor  # (axes, new)
    cache: KVCache  # what the stack holds of this sample, batch 1
    past: int  # its length
    # (levels, new, hidden) to add after layers 0, 1, ...; None where no new token is visual
    deepstack: Tensor | None = None
    cuts: tuple[int, ...] = ()  # lengths at which the sample may be cut later (`prompt.picture_ends`)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the stack made of a row."""

    hidden: Tensor  # (new, hidden), or (1, hidden) when only the last token was wanted
    cache: KVCache  # past and new keys and values, batch 1


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
        first_layer: index of the first layer in the decoder, for DeepStack; None for branches, which have none.
        last_token_only: of the last layer compute the output of each row's last new token only (what the layer needs
            to go on is still kept for all of them).
    """
    if not layers or not rows:
        return [RowResult(r.hidden[-1:] if last_token_only else r.hidden, r.cache.fork()) for r in rows]
    groups = _groups(backbone, rows)
    if len(groups) > 1:
        options: Any = {"first_layer": first_layer, "last_token_only": last_token_only}
        return [result for group in groups for result in run_layers(backbone, layers, group, **options)]
    hidden = (rows[0].hidden if len(rows) == 1 else torch.cat([row.hidden for row in rows]))[None]
    positions = [row.positions for row in rows]
    whole = all(p.dtype == positions[0].dtype for p in positions)
    rotary = backbone.rotary(hidden, torch.cat([p if whole else p.float() for p in positions], dim=1)[:, None])
    packed = Rows(
        [row.cache.fork() for row in rows],
        tuple(row.hidden.shape[0] for row in rows),
        tuple(row.past for row in rows),
        [row.cuts for row in rows],
        None if backbone.packs else _mask(rows[0], hidden),
    )
    deepstack = _packed_deepstack(rows) if first_layer is not None else None
    with backbone.computing():
        for offset, layer in enumerate(layers):
            if last_token_only and offset == len(layers) - 1:
                hidden = backbone.run_last(layer, hidden, rotary, packed)
            else:
                hidden = backbone.run_layer(layer, hidden, rotary, packed.mask, packed)
            if deepstack is not None and first_layer is not None and first_layer + offset < deepstack.shape[0]:
                hidden = hidden + deepstack[first_layer + offset]
    lengths = [1] * len(rows) if last_token_only else list(packed.new)
    return [RowResult(out, cache) for out, cache in zip(hidden[0].split(lengths), packed.caches, strict=True)]


def _groups(backbone: Backbone, rows: Sequence[SequenceSlice]) -> list[Sequence[SequenceSlice]]:
    """Neighbouring rows that run packed together: one alone where the backbone does not pack, on a CPU as many as stay
    within its caches."""
    if not backbone.packs:
        return [[row] for row in rows]
    if backbone.device.type != "cpu":
        return [rows]
    groups: list[list[SequenceSlice]] = [[]]
    for row in rows:
        if groups[-1] and sum(one.hidden.shape[0] for one in [*groups[-1], row]) > _CPU_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return list(groups)


def decode_mask(backbone: Backbone, pads: Sequence[int], total: int, dtype: torch.dtype) -> Tensor | None:
    """Additive mask (batch, 1, 1, total) for one new token a row; None without padding. `pads`: padding positions on
    the left of each row. `total`: keys after appending the new token."""
    if not any(pads):
        return None
    keys = torch.arange(total, device=backbone.device)
    allowed = keys[None] >= torch.tensor(list(pads), device=backbone.device)[:, None]
    return additive_mask(allowed[:, None, None], dtype)


def _mask(row: SequenceSlice, hidden: Tensor) -> Tensor:
    """Additive causal mask (1, 1, queries, keys) of a single row."""
    keys = torch.arange(row.past + hidden.shape[1], device=hidden.device)
    return additive_mask((keys[None] <= keys[row.past :, None])[None, None], hidden.dtype)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to attention scores: 0 where a key may be seen, else the lowest number."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def _packed_deepstack(rows: Sequence[SequenceSlice]) -> Tensor | None:
    """(levels, tokens, hidden), zeros where nothing is added; None when no row has any."""
    template = next((row.deepstack for row in rows if row.deepstack is not None), None)
    if template is None:
        return None
    none = template.new_zeros
    return torch.cat(
        [none(template.shape[0], *row.hidden.shape) if row.deepstack is None else row.deepstack for row in rows], dim=1
    )
