"""Forward passes for training: sequences of different lengths, padded on the right, through a stack of layers.

Unlike in `engine.rows` nothing is kept between calls, so layers can be recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from qzoom.backbones.base import Backbone
from qzoom.engine.layers import additive_mask
from qzoom.engine.prompt import Prompt, embed_prompt
from qzoom.engine.state import Engine, map_inputs
from qzoom.heads.region_map import mean_head_logits


def run_stack(
    backbone: Backbone,
    layers: Sequence[nn.Module],
    hidden: Sequence[Tensor],
    positions: Sequence[Tensor],
    *,
    deepstack: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> list[Tensor]:
    """Outputs (length, hidden) of a stack of layers, which may be empty, for each row.

    Args:
        positions: (axes, length) of each row.
        deepstack: (levels, length, hidden) of each row, added after layers 0, 1, ...; for stacks that start at layer 0.
        recompute: keep no activations inside the layers.
    """
    lengths = [row.shape[0] for row in hidden]
    if not layers:
        return list(hidden)
    batch = pad_sequence(list(hidden), batch_first=True)
    whole = all(p.dtype == positions[0].dtype for p in positions)
    places = pad_sequence([(p if whole else p.float()).T for p in positions], batch_first=True)
    rotary = backbone.rotary(batch, places.permute(2, 0, 1))
    mask = _causal(backbone, batch)
    extra = _padded(deepstack, batch) if deepstack is not None else None
    for index, layer in enumerate(layers):
        if recompute and torch.is_grad_enabled():
            batch = checkpoint(backbone.run_layer, layer, batch, rotary, mask, None, use_reentrant=False)
        else:
            batch = backbone.run_layer(layer, batch, rotary, mask, None)
        if extra is not None and index < extra.shape[1]:
            batch = batch + extra[:, index]
    return [batch[i, :length] for i, length in enumerate(lengths)]


def hidden_states(
    backbone: Backbone, prompts: Sequence[Prompt], count: int, *, recompute: bool = False
) -> list[Tensor]:
    """Hidden states (length, hidden) of whole prompts after the first `count` layers."""
    embedded = [embed_prompt(backbone, prompt) for prompt in prompts]
    return run_stack(
        backbone,
        list(backbone.layers[:count]),
        [hidden for hidden, _ in embedded],
        [prompt.positions for prompt in prompts],
        deepstack=[extra for _, extra in embedded],
        recompute=recompute,
    )


def region_logits_at(
    engine: Engine, hidden: Tensor, prompt: Prompt, queries: Sequence[int], picture: int = 0
) -> list[Tensor]:
    """Mean-head logits (rows, columns) of one picture, one map per asking token (method.md 3 and 5.4).

    `hidden` (length, hidden) are the states of the prompt after the region branch's whole layers.
    """
    assert engine.region is not None
    backbone, last, span = engine.backbone, engine.region.layers[-1], prompt.spans[picture]
    hidden, rotary = map_inputs(engine, hidden[None], prompt.positions[:, None])

    def rows(index: slice | list[int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return hidden[:, index], (rotary[0][:, index], rotary[1][:, index])

    keys = backbone.key(last, *rows(slice(span.start, span.stop)))[0]
    asked = backbone.query(last, *rows(list(queries)))[0]
    joined = engine.config.map_heads == "joined"
    maps = (mean_head_logits(asked[:, i], keys, joined=joined) for i in range(len(queries)))
    return [values.view(span.features.grid) for values in maps]


def _causal(backbone: Backbone, batch: Tensor) -> Tensor | None:
    """Additive mask; None where the attention kernel's own causal mask does it."""
    if backbone.packs:
        return None
    length = batch.shape[1]
    return additive_mask(torch.ones(1, 1, length, length, dtype=torch.bool, device=batch.device).tril(), batch.dtype)


def _padded(deepstack: Sequence[Tensor | None], batch: Tensor) -> Tensor | None:
    """(rows, levels, length, hidden), zeros where nothing is added."""
    template = next((extra for extra in deepstack if extra is not None), None)
    if template is None:
        return None
    out = batch.new_zeros(len(deepstack), template.shape[0], *batch.shape[1:])
    for i, extra in enumerate(deepstack):
        if extra is not None:
            out[i, :, : extra.shape[1]] = extra
    return out
