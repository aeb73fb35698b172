"""Choose the next token of one sample: greedy, or sampled by its own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from qzoom.types import SamplingParams

__all__ = ["GREEDY_BELOW", "Sampler"]

GREEDY_BELOW = 1e-5  # dividing logits by less overflows float32


class Sampler:
    """Draws tokens for one sample.

    Args:
        params: temperature, top_k, top_p and seed. Warping is transformers' own, in its order.
    """

    def __init__(self, params: SamplingParams) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._greedy = params.temperature < GREEDY_BELOW
        self._warp = LogitsProcessorList()
        self._generator = torch.Generator()
        if self._greedy:
            return
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._warp.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            self._warp.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            self._warp.append(TopPLogitsWarper(params.top_p))

    def draw(self, logits: Tensor) -> int:
        """The next token for logits (vocabulary,)."""
        if self._greedy:
            return int(logits.argmax())
        scores = self._warp(torch.empty(1, 0, dtype=torch.long), logits[None].float().cpu())  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._generator))
