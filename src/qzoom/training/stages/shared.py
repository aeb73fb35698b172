"""What the frozen shared layers make of a prompt: computed for a batch, or once per prompt and kept in memory.

A small base with few samples spends its time on drawing, encoding and the shared layers, whose result never changes
while they are frozen. Kept states are computed one prompt at a time, so that they do not depend on what else was in a
batch: a resumed run ends as if it had not been stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from qzoom.engine.prompt import Prompt
from qzoom.engine.state import Engine
from qzoom.training.stages.forward import hidden_states

__all__ = ["SharedStates"]


class SharedStates:
    """H_K of prompts.

    Args:
        limit_gb: how much to keep, in GB (10^9 bytes); 0 keeps nothing. What came first stays.
    """

    def __init__(self, limit_gb: float) -> None:
        self._room = int(limit_gb * 1e9)
        self._keeps = self._room > 0
        self._kept: dict[Hashable, tuple[Prompt, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def of(
        self, engine: Engine, keys: Sequence[Hashable], make: Callable[[int], Prompt]
    ) -> tuple[list[Prompt], list[Tensor]]:
        """Prompts (their visual features left out) and hidden states (length, hidden) after the shared layers.

        Args:
            engine: backbone and K.
            keys: one per prompt; the same key must always mean the same prompt.
            make: the prompt of a position in `keys`.
        """
        count = engine.config.shared_layers
        if not self._keeps:
            prompts = [make(i) for i in range(len(keys))]
            return [_lean(prompt) for prompt in prompts], hidden_states(engine.backbone, prompts, count)
        found = []
        for index, key in enumerate(keys):
            if key in self._kept:
                found.append(self._kept[key])
                continue
            prompt = make(index)
            (hidden,) = hidden_states(engine.backbone, [prompt], count)
            made = (_lean(prompt), hidden)
            size = hidden.numel() * hidden.element_size() + prompt.positions.numel() * 8 + prompt.ids.numel() * 8
            if size <= self._room:
                self._room -= size
                self._kept[key] = made
            found.append(made)
        return [prompt for prompt, _ in found], [hidden for _, hidden in found]


def _lean(prompt: Prompt) -> Prompt:
    """The prompt without its visual features, which the branches do not need."""
    spans = tuple(
        dataclasses.replace(
            span,
            features=dataclasses.replace(
                span.features, tokens=span.features.tokens.new_empty(span.features.tokens.shape[0], 0), deepstack=()
            ),
        )
        for span in prompt.spans
    )
    return dataclasses.replace(prompt, spans=spans)
