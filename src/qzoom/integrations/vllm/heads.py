"""Gate and region branch on hidden states that vLLM computed; no second copy of the base model is loaded."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from qzoom.checkpoints.load import load_engine
from qzoom.engine.cache import LRUCache
from qzoom.engine.perceive import region_logits, sink_logits
from qzoom.engine.prompt import Prompt, blank_features, build_prompt, prefix_length, unexpanded
from qzoom.engine.state import LayerCache, State, advance_gate, advance_region, truncate
from qzoom.errors import QuestionError
from qzoom.settings import Share, from_mapping, settings

KEPT_BYTES = 256 * 2**20
"""Most memory of the branches' keys and values of pictures that were looked at; it comes on top of vLLM's cache."""
LookMode = Literal["auto", "always", "both"]


@settings
class LookParams:
    """What a look asks for in `kv_transfer_params["qzoom"]`; an empty mapping there asks only for the identity."""

    grids: tuple[tuple[int, int], ...]
    """(rows, columns) of visual tokens of every picture of the prompt."""
    mode: LookMode = "auto"
    """"auto" asks the gate and runs the region branch where its score reaches the threshold, "always" runs the region
    branch alone, "both" runs both."""
    threshold: Share = 0.0
    """Of the gate, for "auto"."""


@dataclass(frozen=True, slots=True)
class Look:
    """One prompt whose hidden states are complete."""

    hidden: Tensor  # (tokens, hidden) after the shared layers
    ids: Sequence[int]  # its token ids, placeholders expanded
    params: LookParams  # what is wanted
    pictures: tuple[str, ...] = ()  # what tells its pictures, and the tenant, from others; without it nothing is kept


class Heads:
    """The branches of a checkpoint, and their keys and values of pictures that were looked at before."""

    def __init__(self, checkpoint: str, device: torch.device, dtype: torch.dtype) -> None:
        self.engine = load_engine(checkpoint, dtype=dtype, device_map=str(device), base_weights=False)
        self.kept: LRUCache[State] = LRUCache(KEPT_BYTES, _kept_bytes)

    def run(self, looks: Sequence[Look]) -> list[dict[str, Any]]:
        """Replies of all looks of a step, as one batch; one that cannot be read costs only itself. Returns for each
        {"score": of the gate, "nan" or None, "maps": [{"logits", "sinks"}, ...]} (see `pack`), or {"error"}."""
        replies: list[dict[str, Any]] = [{} for _ in looks]
        states: dict[int, State] = {}
        for i, look in enumerate(looks):
            try:
                states[i] = self._state(look)
            except QuestionError as error:
                replies[i] = {"error": str(error)}
        try:
            answers = self._batch([looks[i] for i in states], list(states.values()))
        except Exception as error:
            if len(states) > 1:
                return [self.run([look])[0] for look in looks]
            answers = [{"error": f"The branches failed ({type(error).__name__}: {error})."}] * len(states)
        for i, answer in zip(states, answers, strict=True):
            replies[i] = answer
        return replies

    @torch.inference_mode()
    def _batch(self, looks: Sequence[Look], states: list[State]) -> list[dict[str, Any]]:
        engine, modes = self.engine, [look.params.mode for look in looks]
        scores: list[float | None] = [None] * len(looks)
        asking = [i for i, mode in enumerate(modes) if mode != "always" and engine.gate is not None]
        if asking and engine.gate is not None:
            advanced, hidden = advance_gate(engine, [states[i] for i in asking])
            logits = engine.gate.logit(torch.stack(hidden)).sigmoid().tolist()
            for i, state, score in zip(asking, advanced, logits, strict=True):
                states[i], scores[i] = state, score
        maps: list[list[dict[str, str | None]]] = [[] for _ in looks]
        zooming = [i for i, look in enumerate(looks) if engine.region is not None and _zooms(look.params, scores[i])]
        if zooming:
            for i, state in zip(zooming, advance_region(engine, [states[i] for i in zooming]), strict=True):
                states[i] = state
                pairs = zip(region_logits(engine, state), sink_logits(engine, state), strict=True)
                maps[i] = [{"logits": pack(logits), "sinks": pack(sinks)} for logits, sinks in pairs]
        for look, state in zip(looks, states, strict=True):
            self._keep(look, state)
        return [
            {"score": "nan" if score is not None and math.isnan(score) else score, "maps": own}
            for score, own in zip(scores, maps, strict=True)
        ]

    def _state(self, look: Look) -> State:
        """The state of a prompt after the shared layers; keys and values stay in vLLM's cache."""
        grids = look.params.grids
        image = self.engine.backbone.image_token_id
        ids = unexpanded(look.ids, image, [rows * columns for rows, columns in grids])
        if ids.count(image) == len(grids):
            prompt = build_prompt(self.engine.backbone, ids, [blank_features(g, look.hidden) for g in grids])
            if prompt.ids.tolist() == list(look.ids):
                kept = self.kept.get(self._key(look, prompt)) if look.pictures else None
                state = kept.on(prompt) if kept else State(prompt, look.hidden)
                return replace(state, hidden=look.hidden, shared=LayerCache(length=len(look.ids)))
        raise QuestionError("The grids of the look do not fit the pictures of its prompt.")

    def _key(self, look: Look, prompt: Prompt) -> bytes:
        """What decides a prompt up to the end of its last picture."""
        ids = list(look.ids[: prefix_length(self.engine.backbone, prompt)])
        return hashlib.sha256(repr((look.pictures, look.params.grids, ids)).encode()).digest()

    def _keep(self, look: Look, state: State) -> None:
        """Keep what the branches computed up to the end of the last picture, unless that is known."""
        if not look.pictures:
            return
        key = self._key(look, state.prompt)
        known = self.kept.peek(key)
        if known and known.gate.length >= bool(state.gate.length) and known.region.length >= bool(state.region.length):
            return
        end = prefix_length(self.engine.backbone, state.prompt)
        cut = truncate(state, end)
        gate, region = (LayerCache(stack.cache.clone(), stack.length) for stack in (cut.gate, cut.region))
        keys = tuple(keys.clone() for keys in cut.keys)
        sink = None if cut.sink_query is None else cut.sink_query.clone()
        blank = State(cut.prompt, look.hidden.new_empty(0), gate=gate, region=region, sink_query=sink, keys=keys)
        self.kept.put(key, blank)


def _kept_bytes(state: State) -> int:
    return state.gate.cache.nbytes + state.region.cache.nbytes + sum(keys.nbytes for keys in state.keys)


def _zooms(params: LookParams, score: float | None) -> bool:
    return params.mode != "auto" or score is None or score >= params.threshold


def read_params(values: Any) -> LookParams:
    """Parameters of a look out of a request (ConfigError: one sentence)."""
    return from_mapping(LookParams, values, "kv_transfer_params.qzoom")


def pack(values: Tensor | None) -> str | None:
    """Numbers of a tensor as base64 of float32, little-endian."""
    return None if values is None else base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpack(text: str | None) -> Tensor | None:
    """The inverse of `pack`, flat."""
    return None if text is None else torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
