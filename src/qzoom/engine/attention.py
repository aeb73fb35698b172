"""Attention of a response to the visual cells of its prompt (docs/method.md 5.1).

Nothing runs with eager attention: the response is run once more over the cached keys, and only the chosen layers'
queries are multiplied with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.engine.cache import KVCache
from qzoom.engine.layers import additive_mask
from qzoom.engine.prompt import Prompt
from qzoom.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ResponseAttention:
    """Attention of one response to one picture."""

    # (layers, heads, rows, columns) float32, mean over the response tokens; each is a share of the whole attention, so
    # a map sums to at most 1
    values: Tensor
    layers: tuple[int, ...]  # indices of the layers, in the order of the first axis

    def mean_of(self, heads: Sequence[tuple[int, int]]) -> Tensor:
        """Mean map (rows, columns) over (layer, head) pairs."""
        return torch.stack([self.values[self.layers.index(layer), head] for layer, head in heads]).mean(0)


def response_attention(
    backbone: Backbone, prompt: Prompt, cache: KVCache, response: Sequence[int], layers: Sequence[int]
) -> tuple[ResponseAttention, ...]:
    """Attention of the generated tokens to every coarse picture of a prompt.

    Args:
        cache: keys and values of all layers for the whole prompt, batch 1; it is left as it was.
        response: the generated ids that were fed back (all but the last one generated); at least one.

    Raises:
        ValueError: the response is empty.
    """
    if not response:
        raise ValueError("A response of at least one fed-back token is needed to take its attention.")
    cache = cache.fork()
    ids = torch.tensor([list(response)], device=backbone.device)
    hidden = backbone.embed(ids)
    steps = torch.arange(len(response), device=backbone.device) + prompt.next_position
    rotary = backbone.rotary(hidden, steps.expand(backbone.position_axes, 1, -1))
    total = len(prompt) + len(response)
    own = torch.arange(len(response), device=backbone.device) + len(prompt)
    hidden_keys = torch.arange(total, device=backbone.device)[None] > own[:, None]
    mask = additive_mask(~hidden_keys[None, None], hidden.dtype)
    spans = [s for s in prompt.spans if s.role == "coarse"]
    found: list[list[Tensor]] = [[] for _ in spans]
    for i in range(max(layers) + 1):
        layer = backbone.layers[i]
        query = backbone.query(layer, hidden, rotary) if i in layers else None
        hidden = backbone.run_layer(layer, hidden, rotary, mask, cache)
        if query is not None:
            shares = _softmax(query[0], cache.layer(i)[0][0], hidden_keys)
            for pieces, span in zip(found, spans, strict=True):
                pieces.append(shares[..., span.start : span.stop].mean(1).view(-1, *span.features.grid))
    chosen = tuple(sorted(layers))
    return tuple(ResponseAttention(torch.stack(pieces), chosen) for pieces in found)


def token_attention(
    backbone: Backbone, prompt: Prompt, cache: KVCache, fed: Sequence[int], heads: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Attention to every visual span of a prompt while each token of an answer was drawn.

    Args:
        cache: as in `response_attention`.
        fed: the generated ids that were fed back (all but the last one generated); none for an answer of one token.
        heads: (layer, head) pairs, whose mean is taken; layers with full attention.

    Returns:
        For every span (fed tokens + 1, rows, columns) float32, shares of the whole attention; the first one is that of
        the prompt's last token, which draws the answer's first, and 0 in models whose linear layers cannot run that
        token again. Tokens that were left out of a region have none.

    Raises:
        ConfigError: a layer or head that the model does not have, or a layer without full attention.
    """
    last = max(layer for layer, _ in heads)
    if not {layer for layer, _ in heads} <= set(backbone.attention_layers):
        raise ConfigError(f"The model has no attention to take in layer {last}; choose another layer in `reread`.")
    ids = torch.cat([prompt.ids[-1:], prompt.ids.new_tensor(list(fed))])[None]
    later = torch.arange(len(fed), device=backbone.device) + prompt.next_position
    positions = torch.cat([prompt.positions[:, -1:], later.expand(backbone.position_axes, -1)], dim=1)
    past, known = len(prompt) - 1, 0
    if len(backbone.attention_layers) < backbone.num_layers:
        ids, positions, past, known = ids[:, 1:], positions[:, 1:], past + 1, 1
    cache = cache.truncated(past)
    if not ids.shape[1]:
        return [torch.zeros(1, *s.features.grid, device=backbone.device) for s in prompt.spans]
    hidden = backbone.embed(ids.to(backbone.device))
    rotary = backbone.rotary(hidden, positions[:, None])
    own = torch.arange(ids.shape[1], device=backbone.device) + past
    hidden_keys = torch.arange(past + ids.shape[1], device=backbone.device)[None] > own[:, None]
    mask = additive_mask(~hidden_keys[None, None], hidden.dtype)
    shares: list[Tensor] = []
    for i in range(last + 1):
        layer, wanted = backbone.layers[i], [head for at, head in heads if at == i]
        query = backbone.query(layer, hidden, rotary) if wanted else None
        hidden = backbone.run_layer(layer, hidden, rotary, mask, cache)
        if query is not None:
            shares += _softmax(query[0], cache.layer(i)[0][0], hidden_keys)[wanted]
    mean, out = torch.stack(shares).mean(0), []
    for span in prompt.spans:
        grid, kept = span.features.grid, span.features.kept
        cells = mean.new_zeros(len(fed) + 1, grid[0] * grid[1])
        cells[known:, slice(None) if kept is None else kept] = mean[:, span.start : span.stop]
        out.append(cells.unflatten(1, grid))
    return out


def _softmax(query: Tensor, keys: Tensor, hidden_keys: Tensor) -> Tensor:
    """Attention shares (heads, queries, keys) in float32; `hidden_keys` (queries, keys) are not seen."""
    groups = query.shape[0] // keys.shape[0]
    keys = keys.float().repeat_interleave(groups, dim=0)
    scores = query.float() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    return scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
