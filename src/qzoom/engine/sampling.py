"""Which token comes next: penalties, the mask of a grammar, then the likeliest token or a drawn one.

Each answer has a `Sampler` with all its state (how often tokens came, its place in the grammar, log probabilities), so
rows join, pause and leave a batch without touching each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from qzoom.engine.grammar import JsonGrammar
from qzoom.errors import CheckpointError
from qzoom.types import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # dividing logits by less overflows float32


def penalised(logits: Tensor, counts: Mapping[int, int], presence: float, frequency: float) -> Tensor:
    """Logits (vocabulary,) less `presence` for each token that came and `frequency` for each time that it came.

    This is OpenAI's rule for `presence_penalty` and `frequency_penalty`; tokens of the prompt do not count.
    """
    if not counts:
        return logits
    ids = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, -(presence + frequency * times))


def token_logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Natural logarithms of probabilities under the model's own logits (vocabulary,), before anything changes them."""
    scores = logits.float().log_softmax(-1)
    best = scores.topk(min(top, len(scores)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(scores[token]), tuple(pairs))


class Sampler:
    """Draws the tokens of one answer.

    Args:
        params: temperature, top_k, top_p, seed, penalties, log probabilities. Warping is transformers' own, in its
            order, after penalties and grammar.
        grammar: what the answer must follow; None leaves it free.
    """

    def __init__(self, params: SamplingParams, grammar: JsonGrammar | None = None) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.logprobs: list[TokenLogprob] = []
        self._params = params
        self._grammar = grammar
        self._counts: Counter[int] = Counter()
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

    @property
    def ended(self) -> bool:
        """Whether the grammar leaves nothing but the end."""
        return self._grammar is not None and self._grammar.ended

    def draw(self, logits: Tensor) -> int:
        """The next token for logits (vocabulary,) (CheckpointError: they are not numbers; SchemaError: the grammar
        became too complex)."""
        best = int(logits.argmax())  # a NaN or infinity, where there is one
        if not math.isfinite(float(logits[best])):
            raise CheckpointError(
                "The model's output is not a number (NaN or infinity), so it has no answer; its weights are damaged, "
                "or its dtype is too small for them."
            )
        token = self._choose(logits, best)
        if self._params.presence_penalty or self._params.frequency_penalty:
            self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.advance(token)
        if self._params.logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self._params.logprobs))
        return token

    def _choose(self, logits: Tensor, best: int) -> int:
        scores = penalised(logits, self._counts, self._params.presence_penalty, self._params.frequency_penalty)
        if self._grammar is not None:
            scores = self._grammar.mask(scores)
        if self._greedy:
            return best if scores is logits else int(scores.argmax())
        warped = self._warp(torch.empty(1, 0, dtype=torch.long), scores[None].float().cpu())
        return int(torch.multinomial(warped.softmax(-1)[0], 1, generator=self._generator))
