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
    ids = torch.tensor([list(response)], device=backbone.device)
    steps = torch.arange(len(response), device=backbone.device) + prompt.next_position
    shares = _shares(backbone, ids, steps.expand(backbone.position_axes, -1), cache.fork(), layers)
    chosen = tuple(sorted(layers))
    return tuple(
        ResponseAttention(
            torch.stack([shares[i][..., s.start : s.stop].mean(1).view(-1, *s.features.grid) for i in chosen]), chosen
        )
        for s in prompt.spans
        if s.role == "coarse"
    )


def check_reread_heads(backbone: Backbone, heads: Sequence[tuple[int, int]]) -> None:
    """Refuse (layer, head) pairs of `ZoomConfig.reread` that the model does not have (ConfigError)."""
    count = backbone.text_config.num_attention_heads
    for layer, head in heads:
        if layer not in backbone.attention_layers or head >= count:
            raise ConfigError(
                f"The model has no attention of head {head} in layer {layer}; choose `reread` heads below {count} in "
                f"one of the layers {', '.join(map(str, backbone.attention_layers))}."
            )


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
    check_reread_heads(backbone, heads)
    ids = torch.cat([prompt.ids[-1:], prompt.ids.new_tensor(list(fed))])[None]
    later = torch.arange(len(fed), device=backbone.device) + prompt.next_position
    positions = torch.cat([prompt.positions[:, -1:], later.expand(backbone.position_axes, -1)], dim=1)
    past, known = len(prompt) - 1, 0
    if len(backbone.attention_layers) < backbone.num_layers:
        ids, positions, past, known = ids[:, 1:], positions[:, 1:], past + 1, 1
    if not ids.shape[1]:
        return [torch.zeros(1, *s.features.grid, device=backbone.device) for s in prompt.spans]
    layers = sorted({layer for layer, _ in heads})
    found = _shares(backbone, ids.to(backbone.device), positions, cache.truncated(past), layers)
    shares = [found[layer][head] for layer, head in heads]
    mean, out = torch.stack(shares).mean(0), []
    for span in prompt.spans:
        grid, kept = span.features.grid, span.features.kept
        cells = mean.new_zeros(len(fed) + 1, grid[0] * grid[1])
        cells[known:, slice(None) if kept is None else kept] = mean[:, span.start : span.stop]
        out.append(cells.unflatten(1, grid))
    return out


def _shares(
    backbone: Backbone, ids: Tensor, positions: Tensor, cache: KVCache, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Attention (heads, tokens, keys) of each of some layers while tokens follow what a cache holds.

    Args:
        ids: (1, tokens).
        positions: (axes, tokens).
        cache: of all layers; it gets the tokens.
    """
    hidden, past = backbone.embed(ids), len(cache)
    rotary = backbone.rotary(hidden, positions[:, None])
    own = torch.arange(ids.shape[1], device=backbone.device) + past
    hidden_keys = torch.arange(past + ids.shape[1], device=backbone.device)[None] > own[:, None]
    mask = additive_mask(~hidden_keys[None, None], hidden.dtype)
    out: dict[int, Tensor] = {}
    for i in range(max(layers) + 1):
        layer = backbone.layers[i]
        query = backbone.query(layer, hidden, rotary) if i in layers else None
        hidden = backbone.run_layer(layer, hidden, rotary, mask, cache)
        if query is not None:
            out[i] = _softmax(query[0], cache.layer(i)[0][0], hidden_keys)
    return out


def _softmax(query: Tensor, keys: Tensor, hidden_keys: Tensor) -> Tensor:
    """Attention shares (heads, queries, keys) in float32; `hidden_keys` (queries, keys) are not seen."""
    groups = query.shape[0] // keys.shape[0]
    keys = keys.float().repeat_interleave(groups, dim=0)
    scores = query.float() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    return scores.masked_fill(hidden_keys, float("-inf")).softmax(-1)
