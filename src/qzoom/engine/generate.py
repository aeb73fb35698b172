"""The answer, token by token: prefill of the upper layers, and decoding many samples as one batch.

Each row of the batch has its own length, position, sampler and end. Rows join with the state that their prefill left
and leave as soon as they end; the remaining rows continue as a smaller batch. `TextStream` turns token ids into text
piece by piece: no half characters, nothing past a stop text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.engine.cache import KVCache
from qzoom.engine.grammar import JsonGrammar
from qzoom.engine.layers import decode_mask
from qzoom.engine.perceive import CoarseResult, Stopwatch
from qzoom.engine.sampling import Sampler
from qzoom.engine.state import Engine, State, advance_upper
from qzoom.errors import CheckpointError, SchemaError
from qzoom.types import Region, SamplingParams, TokenLogprob


class TextStream:
    """Text of one answer as its tokens arrive; white space around the whole answer is left out.

    The pieces that `push` and `finish` return join to `text`. Each token costs the decoding of a few tokens, however
    long the answer is: a token's text is what it adds to the text of the token before it. A character whose last bytes
    never come is left out.

    Args:
        stop: texts that end the answer and are not part of it.
    """

    _LONGEST_WINDOW = 64
    """Tokens that may wait for the end of a character."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._window: list[int] = []  # the last tokens whose text is complete, then those that wait
        self._complete = 0
        self._raw = ""
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, up to a stop text."""
        return self._raw.strip()

    def push(self, token: int) -> str:
        """Add a token; returns the new text that is certain."""
        self._window.append(token)
        before, after = self._decode(self._window[: self._complete]), self._decode(self._window)
        if len(self._window) - self._complete < self._LONGEST_WINDOW and (
            after.endswith("\ufffd") or len(after) <= len(before)
        ):
            return ""
        length = len(self._raw)
        self._raw += after[len(before) :]
        self._window = self._window[self._complete :]
        self._complete = len(self._window)
        hits = [at for at in (self._raw.find(s, max(0, length - len(s) + 1)) for s in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            self._raw = self._raw[: min(hits)]
            return self.finish()
        return self._release(len(self._raw) - max((_overlap(self._raw, s) for s in self._stop), default=0))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._release(len(self._raw))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _release(self, until: int) -> str:
        shown = self._raw[:until].strip()
        piece = shown[self._sent :]
        self._sent = max(self._sent, len(shown))
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(slots=True)
class DecodeRow:
    """One sample being decoded."""

    key: int  # the caller's name for it
    cache: KVCache  # keys and values of all layers for the prompt, batch 1
    length: int  # the prompt's length
    position: float  # position of the next token, on all axes
    logits: Tensor  # (vocabulary,) for the next token
    params: SamplingParams  # how to decode
    sampler: Sampler  # draws tokens
    stream: TextStream  # collects text
    tokens: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length", "cancelled"] = ""
    reported: int = 0
    error: CheckpointError | SchemaError | None = None  # why it has no answer

    def take(self, eos_ids: Sequence[int]) -> str:
        """Draw a token from the logits; returns the new text and sets `finish` when the row has ended.

        Logits that are no numbers, or a grammar that has become too complex, end this row alone, with `error`.
        """
        try:
            token = self.sampler.draw(self.logits)
        except (CheckpointError, SchemaError) as error:
            self.error, self.finish = error, "stop"
            return ""
        self.tokens.append(token)
        ended = token in eos_ids and not self.params.ignore_eos
        piece = "" if ended else self.stream.push(token)
        del self.sampler.logprobs[len(self.tokens) - ended :]  # the end token has no text
        if ended or self.stream.stopped or self.sampler.ended:
            self.finish = "stop"
        elif len(self.tokens) >= self.params.max_new_tokens:
            self.finish = "length"
        return piece + (self.stream.finish() if self.finish and not self.stream.stopped else "")

    def new_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Those that have come since the last call."""
        start, self.reported = self.reported, len(self.sampler.logprobs)
        return tuple(self.sampler.logprobs[start:])


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A request that is ready to be decoded."""

    row: DecodeRow  # what decoding needs, under the request's key
    coarse: CoarseResult  # what the answer's record needs: of the state, the prompt only
    regions: tuple[Region, ...]  # what was read at high resolution
    clock: Stopwatch  # milliseconds per step, shared by all requests that ran together
    before: CoarseResult | None = None  # the request before its regions, where its answer may be read again


@torch.inference_mode()
def prefill(
    engine: Engine, coarse: Sequence[CoarseResult], clock: Stopwatch, keys: Sequence[int] | None = None
) -> list[DecodeRow]:
    """Layers K..N-1; zoomed and plain prompts run as two batches, since their lengths differ most.

    Args:
        keys: of the rows; None takes their indices.

    Returns:
        One row per request, ready for a `DecodeBatch`.
    """
    results: dict[int, tuple[State, Tensor]] = {}
    with clock.step("upper_layers"):
        for zoomed in (False, True):
            group = [i for i, item in enumerate(coarse) if item.gate.zoomed == zoomed]
            if group:
                states, logits = advance_upper(engine, [coarse[i].state for i in group])
                results |= dict(zip(group, zip(states, logits, strict=True), strict=True))
    rows = []
    for i, item in enumerate(coarse):
        state, first_logits = results[i]
        params = item.request.options.sampling
        grammar = JsonGrammar(engine.backbone, params.json_schema) if params.json_schema else None
        rows.append(
            DecodeRow(
                key=i if keys is None else keys[i],
                cache=state.shared.cache.merged(state.upper.cache),
                length=len(state.prompt),
                position=state.prompt.next_position,
                logits=first_logits,
                params=params,
                sampler=Sampler(params, grammar),
                stream=TextStream(engine.backbone.tokenizer, params.stop),
            )
        )
    return rows


class DecodeBatch:
    """The running batch. `eos_ids`: tokens that end an answer; None uses the model's own."""

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
        """Let new rows join; draws each one's first token. Returns each row with its text; those with a `finish` have
        ended already."""
        pieces = [(row, row.take(self._eos)) for row in rows]
        self._join([row for row in rows if not row.finish])
        return pieces

    def preempt(self, key: int) -> DecodeRow:
        """Take a row out, with its keys and values, until `resume`; its place is free at once (KeyError: no row of that
        name is running)."""
        index = next((i for i, row in enumerate(self._rows) if row.key == key), None)
        if index is None:
            raise KeyError(key)
        row = self._rows[index]
        row.cache = self._cache.row(index, [slice(self._total - row.length, self._total)]).clone()
        self._keep([i for i in range(len(self._rows)) if i != index])
        return row

    @torch.inference_mode()
    def resume(self, rows: Sequence[DecodeRow]) -> None:
        """Let preempted rows join again; they continue with the next step."""
        self._join(rows)

    def cancel(self, key: int) -> str:
        """End a row; it leaves before the next step. Returns text that had been held back."""
        held = ""
        for row in self._rows:
            if row.key == key:
                row.finish = "cancelled"
                held = row.stream.finish()
        self._leave()
        return held

    def clear(self) -> None:
        """Forget every row, whatever state they and their keys and values are in."""
        self._rows, self._cache, self._total = [], KVCache(), 0

    @torch.inference_mode()
    def step(self) -> list[tuple[DecodeRow, str]]:
        """One token for every row. Returns each row with its new text; those with a `finish` have ended and left."""
        rows = list(self._rows)
        if not rows:
            return []
        backbone = self._backbone
        hidden = backbone.embed(torch.tensor([[row.tokens[-1]] for row in rows], device=backbone.device))
        positions = torch.tensor([[row.position] for row in rows], device=backbone.device)
        positions = positions.expand(backbone.position_axes, -1, -1)
        rotary = backbone.rotary(hidden, positions)
        mask = decode_mask(backbone, [self._total - row.length for row in rows], self._total + 1, hidden.dtype)
        with backbone.computing():
            for layer in backbone.layers:
                hidden = backbone.run_layer(layer, hidden, rotary, mask, self._cache)
        logits = backbone.lm_logits(hidden[:, -1])
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
        """Add rows; where there is no memory for that, the batch stays as it was."""
        if not rows:
            return
        old = [
            (row, self._cache.row(i, [slice(self._total - row.length, self._total)]))
            for i, row in enumerate(self._rows)
        ]
        pairs = old + [(row, row.cache) for row in rows]
        joined = [row for row, _ in pairs]
        room = min(64, max(row.params.max_new_tokens for row in joined))
        cache = KVCache.stack([cache for _, cache in pairs], [row.length for row in joined], extra=room)
        self._rows, self._cache, self._total = joined, cache, max(row.length for row in joined)
        for row in rows:
            row.cache = KVCache()

    def _leave(self) -> None:
        keep = [i for i, row in enumerate(self._rows) if not row.finish]
        if len(keep) < len(self._rows):
            self._keep(keep)

    def _keep(self, keep: Sequence[int]) -> None:
        if not keep:
            self.clear()
            return
        rows = [self._rows[i] for i in keep]
        longest = max(row.length for row in rows)
        cache = self._cache.select(keep, drop=self._total - longest)
        self._rows, self._cache, self._total = rows, cache, longest
