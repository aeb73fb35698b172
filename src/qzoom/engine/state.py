"""What has been computed of one sample, stack by stack, so that nothing is computed twice.

Four stacks of layers read a prompt: the shared layers 0..K-1, the gate, the region branch, and the upper layers
K..N-1. Each remembers how far it has come; `advance_*` brings it to the end of a prompt. A session keeps the state of
its prefix and every question continues from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Backbone, Rotary
from qzoom.backbones.lora import LoraWeights
from qzoom.config import ZoomConfig
from qzoom.engine.cache import KVCache
from qzoom.engine.layers import SequenceSlice, run_layers
from qzoom.engine.prompt import Prompt, embed_prompt, picture_ends
from qzoom.heads.branches import GateBranch, RegionBranch


@dataclass(frozen=True, slots=True)
class Engine:
    """A backbone with its branches and arithmetic; everything a question needs, nothing that a question changes."""

    backbone: Backbone  # the family's wrapped model
    gate: GateBranch | None
    region: RegionBranch | None
    config: ZoomConfig
    lora: LoraWeights | None = None  # what was added to the base's own weights, for adapters that are saved later

    @property
    def shared(self) -> list[nn.Module]:
        """Layers 0..K-1."""
        return list(self.backbone.layers[: self.config.shared_layers])

    @property
    def upper(self) -> list[nn.Module]:
        """Layers K..N-1."""
        return list(self.backbone.layers[self.config.shared_layers :])


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One stack's cache of a sample and the length it covers."""

    cache: KVCache = field(default_factory=KVCache)
    length: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """All that is known of one sample."""

    prompt: Prompt  # what it is about; the shared layers have seen `hidden.shape[0]` of its tokens
    hidden: Tensor  # H_K, (length, hidden)
    shared: LayerCache = field(default_factory=LayerCache)  # layers 0..K-1
    gate: LayerCache = field(default_factory=LayerCache)
    region: LayerCache = field(default_factory=LayerCache)
    upper: LayerCache = field(default_factory=LayerCache)  # layers K..N-1
    region_last: Tensor | None = None  # the last token's hidden state (hidden,) after the region branch's whole layers
    # the first token's head-0 query in the region branch's last layer, (1, head_dim), where the sink rule needs it
    sink_query: Tensor | None = None
    keys: tuple[Tensor, ...] = ()  # that layer's keys of each picture's coarse cells, (kv_heads, n, head_dim)
    logits: Tensor | None = None  # of the next token, (vocabulary,), where the upper layers saw the whole prompt

    @classmethod
    def empty(cls, engine: Engine, prompt: Prompt) -> State:
        """Nothing computed yet."""
        hidden = torch.empty(0, engine.backbone.hidden_size, dtype=engine.backbone.dtype, device=engine.backbone.device)
        return cls(prompt, hidden)

    def on(self, prompt: Prompt) -> State:
        """The same state for a prompt that begins with what has been computed."""
        return dataclasses.replace(self, prompt=prompt, logits=None)


def truncate(state: State, length: int) -> State:
    """The state after the first `length` tokens only; `length` must not cut a visual span."""

    def cut(stack: LayerCache) -> LayerCache:
        return LayerCache(stack.cache.truncated(length), min(length, stack.length))

    pictures = sum(1 for s in state.prompt.spans if s.role == "coarse" and s.stop <= length)
    return State(
        state.prompt,
        state.hidden[:length],
        cut(state.shared),
        cut(state.gate),
        cut(state.region),
        cut(state.upper),
        None,
        state.sink_query,
        state.keys[:pictures],
    )


def advance_shared(engine: Engine, states: Sequence[State]) -> list[State]:
    """Run layers 0..K-1 over the tokens that they have not seen."""
    rows = []
    for state in states:
        start, end = state.shared.length, len(state.prompt)
        hidden, deepstack = embed_prompt(engine.backbone, state.prompt, start, end)
        cuts = picture_ends(engine.backbone, state.prompt)
        positions = state.prompt.positions[:, start:end]
        rows.append(SequenceSlice(hidden, positions, state.shared.cache, start, deepstack, cuts))
    out = []
    for state, row, result in zip(
        states, rows, run_layers(engine.backbone, engine.shared, rows, first_layer=0), strict=True
    ):
        length = row.past + row.hidden.shape[0]
        hidden = torch.cat([state.hidden[: row.past], result.hidden]) if row.past else result.hidden
        out.append(dataclasses.replace(state, hidden=hidden, shared=LayerCache(result.cache, length)))
    return out


def advance_gate(engine: Engine, states: Sequence[State]) -> tuple[list[State], list[Tensor]]:
    """Run the gate's layers. Returns the new states, and for each sample the last token's hidden state (hidden,) after
    the T layers."""
    assert engine.gate is not None
    rows = [_hidden_row(engine, state, state.gate) for state in states]
    results = run_layers(engine.backbone, list(engine.gate.layers), rows, last_token_only=True)
    out = [
        dataclasses.replace(state, gate=LayerCache(result.cache, state.hidden.shape[0]))
        for state, result in zip(states, results, strict=True)
    ]
    return out, [result.hidden[-1] for result in results]


def advance_region(engine: Engine, states: Sequence[State]) -> list[State]:
    """Run the region branch's T - 1 whole layers and collect the last layer's keys of the coarse cells."""
    assert engine.region is not None
    backbone, last = engine.backbone, engine.region.layers[-1]
    rows = [_hidden_row(engine, state, state.region) for state in states]
    results = run_layers(backbone, list(engine.region.layers[:-1]), rows)
    out = []
    for state, row, result in zip(states, rows, results, strict=True):
        hidden, rotary = map_inputs(engine, result.hidden[None], row.positions[:, None])
        sink_query = state.sink_query
        if row.past == 0 and engine.config.sink == "first_token":
            first = (rotary[0][:, :1], rotary[1][:, :1])
            sink_query = backbone.query(last, hidden[:, :1], first)[0, :1, 0]
        keys = list(state.keys)
        for span in state.prompt.spans:
            if span.role == "coarse" and span.start >= row.past:
                piece = slice(span.start - row.past, span.stop - row.past)
                cells = (rotary[0][:, piece], rotary[1][:, piece])
                keys.append(backbone.key(last, hidden[:, piece], cells)[0])
        stack = LayerCache(result.cache, state.hidden.shape[0])
        out.append(
            dataclasses.replace(
                state, region=stack, region_last=result.hidden[-1], sink_query=sink_query, keys=tuple(keys)
            )
        )
    return out


def map_inputs(engine: Engine, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Rotary]:
    """What the region branch's last layer takes its queries and keys from (docs/method.md 3).

    Args:
        engine: with a region branch.
        hidden: (batch, length, hidden) after the branch's whole layers.
        positions: (axes, batch, length).

    Returns:
        The hidden states, after the branch's own norm if it has one, and cosines and sines, which turn nothing where
        the map has no rotation.
    """
    assert engine.region is not None
    hidden = engine.region.normed(hidden)
    cosines, sines = engine.backbone.rotary(hidden, positions)
    if not engine.config.map_rotary:
        cosines, sines = torch.ones_like(cosines), torch.zeros_like(sines)
    return hidden, (cosines, sines)


def advance_upper(engine: Engine, states: Sequence[State]) -> tuple[list[State], list[Tensor]]:
    """Run layers K..N-1 over the tokens that they have not seen. Returns the new states, and for each sample the logits
    (vocabulary,) of the next token."""
    ran = iter(_run_upper(engine, [state for state in states if state.logits is None]))
    out = [next(ran) if state.logits is None else state for state in states]
    return out, [state.logits for state in out if state.logits is not None]


def _run_upper(engine: Engine, states: Sequence[State]) -> list[State]:
    rows = []
    for state in states:
        row = _hidden_row(engine, state, state.upper)
        if engine.backbone.deepstack_levels > engine.config.shared_layers:
            _, deepstack = embed_prompt(engine.backbone, state.prompt, row.past, state.hidden.shape[0])
            row = dataclasses.replace(row, deepstack=deepstack)
        rows.append(row)
    results = run_layers(
        engine.backbone, engine.upper, rows, first_layer=engine.config.shared_layers, last_token_only=True
    )
    return [
        dataclasses.replace(
            state,
            upper=LayerCache(result.cache, state.hidden.shape[0]),
            logits=engine.backbone.lm_logits(result.hidden[-1]),
        )
        for state, result in zip(states, results, strict=True)
    ]


def _hidden_row(engine: Engine, state: State, stack: LayerCache) -> SequenceSlice:
    """H_K from where a stack stopped, as its next input."""
    start, end = stack.length, state.hidden.shape[0]
    cuts = picture_ends(engine.backbone, state.prompt)
    return SequenceSlice(state.hidden[start:end], state.prompt.positions[:, start:end], stack.cache, start, cuts=cuts)
