"""Token by token, many samples at once: each row has its own length, position, sampler and end.

Rows join with the state that their prefill left and leave as soon as they end; what is left goes on as a smaller batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.engine.cache import KVCache
from qzoom.engine.rows import decode_mask
from qzoom.engine.sampling import Sampler
from qzoom.engine.text import TextStream
from qzoom.types import SamplingParams

__all__ = ["DecodeBatch", "DecodeRow"]


@dataclass(slots=True)
class DecodeRow:
    """One sample being decoded.

    Args:
        key: the caller's name for it.
        cache: keys and values of all layers for the prompt, batch 1.
        length: the prompt's length.
        position: position of the next token, on all axes.
        logits: (vocabulary,) for the next token.
        params: how to decode.
        sampler: draws tokens.
        stream: collects text.
    """

    key: int
    cache: KVCache
    length: int
    position: float
    logits: Tensor
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length", "cancelled"] = ""

    def take(self, eos_ids: Sequence[int]) -> str:
        """Draw a token from the logits; returns the new text and sets `finish` when the row has ended."""
        token = self.sampler.draw(self.logits)
        self.tokens.append(token)
        ended = token in eos_ids and not self.params.ignore_eos
        piece = "" if ended else self.stream.push(token)
        if ended or self.stream.stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.params.max_new_tokens:
            self.finish = "length"
        return piece + (self.stream.finish() if self.finish and not self.stream.stopped else "")


class DecodeBatch:
    """The running batch.

    Args:
        backbone: the family.
        eos_ids: tokens that end an answer; None uses the model's own.
    """

    def __init__(self, backbone: Backbone, eos_ids: Sequence[int] | None = None) -> None:
        self._backbone = backbone
        self._eos = backbone.eos_ids if eos_ids is None else tuple(eos_ids)
        self._rows: list[DecodeRow] = []
        self._cache = KVCache()
        self._total = 0  # length of the batch's cache, padding included

    @property
    def rows(self) -> tuple[DecodeRow, ...]:
        """Rows that have not ended."""
        return tuple(self._rows)

    @torch.inference_mode()
    def start(self, rows: Sequence[DecodeRow]) -> list[tuple[DecodeRow, str]]:
        """Let rows join; draws each one's first token.

        Returns:
            Each new row with its first piece of text; those with a `finish` have ended already.
        """
        pieces = [(row, row.take(self._eos)) for row in rows]
        self._join([row for row in rows if not row.finish])
        return pieces

    def park(self, key: int) -> DecodeRow:
        """Take a row out with all that it needs to go on later (see `resume`); its place is free at once.

        Raises:
            KeyError: no row of that name is running.
        """
        place = next((i for i, row in enumerate(self._rows) if row.key == key), None)
        if place is None:
            raise KeyError(key)
        row = self._rows[place]
        row.cache = self._cache.row(place, [slice(self._total - row.length, self._total)]).copied()
        self._keep([i for i in range(len(self._rows)) if i != place])
        return row

    @torch.inference_mode()
    def resume(self, rows: Sequence[DecodeRow]) -> None:
        """Let parked rows join again; they go on with the next step."""
        self._join(rows)

    def cancel(self, key: int) -> str:
        """End a row; it leaves before the next step.

        Returns:
            Text that had been held back.
        """
        held = ""
        for row in self._rows:
            if row.key == key:
                row.finish = "cancelled"
                held = row.stream.finish()
        self._leave()
        return held

    @torch.inference_mode()
    def step(self) -> list[tuple[DecodeRow, str]]:
        """One token for every row.

        Returns:
            Each row with its new text; those with a `finish` have ended and left.
        """
        rows = list(self._rows)
        if not rows:
            return []
        backbone = self._backbone
        hidden = backbone.embed(torch.tensor([[row.tokens[-1]] for row in rows], device=backbone.device))
        positions = torch.tensor([[row.position] for row in rows], device=backbone.device)
        positions = positions.expand(backbone.position_axes, -1, -1)
        rotary = backbone.rotary(hidden, positions)
        mask = decode_mask(backbone, [self._total - row.length for row in rows], self._total + 1, hidden.dtype)
        for layer in backbone.layers:
            hidden = backbone.run_layer(layer, hidden, rotary, mask, self._cache)
        logits = backbone.finish(hidden[:, -1])
        self._total += 1
        out = []
        for row, own in zip(rows, logits, strict=True):
            row.length += 1
            row.position += 1
            row.logits = own
            out.append((row, row.take(self._eos)))
        self._leave()
        return out

    def _join(self, rows: Sequence[DecodeRow]) -> None:
        if not rows:
            return
        old = [
            (row, self._cache.row(i, [slice(self._total - row.length, self._total)]))
            for i, row in enumerate(self._rows)
        ]
        pairs = old + [(row, row.cache) for row in rows]
        self._rows = [row for row, _ in pairs]
        room = min(64, max(row.params.max_new_tokens for row in self._rows))
        self._cache = KVCache.stack([cache for _, cache in pairs], [row.length for row in self._rows], extra=room)
        self._total = max(row.length for row in self._rows)
        for row in rows:
            row.cache = KVCache()

    def _leave(self) -> None:
        keep = [i for i, row in enumerate(self._rows) if not row.finish]
        if len(keep) < len(self._rows):
            self._keep(keep)

    def _keep(self, keep: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in keep]
        if not keep:
            self._cache, self._total = KVCache(), 0
            return
        longest = max(row.length for row in self._rows)
        self._cache = self._cache.select(keep, drop=self._total - longest)
        self._total = longest
