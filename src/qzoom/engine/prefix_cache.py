"""Prefixes kept across questions: whoever asks again about the same pictures pays for the question only.

An entry is the frozen state of everything up to the end of a conversation's last picture. It is taken from what an
answer computed anyway, so the first question about a picture costs nothing extra.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

from qzoom.engine.cache import KVCache
from qzoom.engine.lru import LRUCache
from qzoom.engine.perceive import CoarseResult
from qzoom.engine.prompt import Prompt, prefix_length
from qzoom.engine.request import Request, coarse_budget
from qzoom.engine.state import Engine, LayerCache, State, truncate
from qzoom.engine.zoom import features_bytes, own_features
from qzoom.images.load import pixel_digest

__all__ = ["PrefixCache", "prefix_key", "prefix_state"]

_REGION_PART = 8


class PrefixCache(LRUCache[State]):
    """The most recently used prefix states within a bound of memory. Safe to use from several threads.

    Args:
        max_bytes: memory of all entries together, with an eighth of it for `regions`; 0 keeps nothing.

    `regions` has the features of regions that were read on these prefixes (see `encode_crops`).
    """

    def __init__(self, max_bytes: int) -> None:
        self.regions = LRUCache(max_bytes // _REGION_PART, features_bytes)
        super().__init__(max_bytes - self.regions.max_bytes, _size)

    def wants(self, key: bytes, item: CoarseResult) -> bool:
        """Whether a look went further than what is held: it is new, or more of its stacks were run."""
        held = self.peek(key)
        if held is None:
            return self.max_bytes > 0
        pairs = ((held.gate, item.state.gate), (held.region, item.state.region))
        return any(new.length and not old.length for old, new in pairs)


def prefix_key(engine: Engine, request: Request, tenant: str = "") -> bytes:
    """What decides a prefix: the tenant, the tokens up to the end of the last picture, the coarse budget, and every
    picture's mode, size and pixels; b"" for a request without pictures."""
    if not request.pictures:
        return b""
    image = engine.backbone.image_token_id
    last = len(request.ids) - 1 - request.ids[::-1].index(image)
    end = last + 1 + len(engine.backbone.image_delimiters[1])
    budget = coarse_budget(engine, request.options)
    facts = [tenant, request.ids[:end], budget.min_tokens, budget.max_tokens]
    facts += [(picture.image.mode, picture.size_px) for picture in request.pictures]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for picture in request.pictures:
        digest.update(picture.digest or pixel_digest(picture.image))
    return digest.digest()


def prefix_state(engine: Engine, item: CoarseResult, cache: KVCache | None = None) -> State:
    """An own copy of what a look computed up to the end of its last picture.

    Args:
        engine: backbone and K.
        item: right after the look, before regions were read.
        cache: the finished prefill's keys and values of all layers; None leaves the upper layers to be run again.
    """
    end = prefix_length(engine.backbone, item.state.prompt)
    state = truncate(item.state, end)
    spans = tuple(dataclasses.replace(span, features=own_features(span.features)) for span in state.prompt.spans)
    prompt = Prompt(state.prompt.ids[:end].clone(), state.prompt.positions[:, :end].clone(), spans)
    upper = LayerCache()
    if cache is not None:
        layers = range(engine.config.shared_layers, len(engine.backbone.layers))
        zoomed = [box.image for box in item.boxes] if item.gate.zoomed else []
        kept = min([end, *(spans[image].stop + len(engine.backbone.image_delimiters[1]) for image in zoomed)])
        upper = LayerCache(cache.truncated(kept).copied(layers), kept)
    return State(
        prompt,
        state.hidden.clone(),
        _copied(state.shared),
        _copied(state.gate),
        _copied(state.region),
        upper,
        None,
        None if state.sink_query is None else state.sink_query.clone(),
        tuple(keys.clone() for keys in state.keys),
    )


def _copied(stack: LayerCache) -> LayerCache:
    return LayerCache(stack.cache.copied(), stack.length)


def _size(state: State) -> int:
    tensors = [state.hidden, state.prompt.ids, state.prompt.positions, *state.keys]
    features = sum(features_bytes(span.features) for span in state.prompt.spans)
    stacks = (state.shared, state.gate, state.region, state.upper)
    return features + sum(t.numel() * t.element_size() for t in tensors) + sum(s.cache.nbytes for s in stacks)
