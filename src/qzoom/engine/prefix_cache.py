"""Prefixes cached across questions: a second question about the same pictures costs the question only.

An entry is the frozen state of everything up to the end of a conversation's last picture. It is taken from what an
answer computed anyway, so the first question about a picture costs nothing extra.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping

import torch

from qzoom.engine.cache import KVCache, LRUCache
from qzoom.engine.perceive import CoarseResult
from qzoom.engine.prompt import Prompt, prefix_length
from qzoom.engine.request import Request, coarse_budgets
from qzoom.engine.state import Engine, LayerCache, State, truncate
from qzoom.engine.zoom import clone_features, features_bytes
from qzoom.images.load import pixel_digest

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

    def waves(
        self, requests: Mapping[int, Request], prefixes: Mapping[int, bytes]
    ) -> Iterator[tuple[list[int], list[bytes], list[Request]]]:
        """Requests in the order in which they run, each on its cached prefix where there is one.

        Those that share a prefix which is not cached yet come in the wave after the one that computes it.

        Yields:
            Keys, prefix keys (b"" for none) and requests of a wave.
        """
        left = dict(requests)
        computed = {b""} | {prefix for prefix in prefixes.values() if self.peek(prefix) is not None}
        while left:
            first: dict[bytes, int] = {}
            for key in left:
                first.setdefault(prefixes.get(key, b""), key)
            keys = [k for k in left if prefixes.get(k, b"") in computed or first[prefixes[k]] == k]
            computed |= first.keys()
            prefix_keys = [prefixes.get(key, b"") for key in keys]
            yield keys, prefix_keys, [self._on_prefix(p, left.pop(k)) for k, p in zip(keys, prefix_keys, strict=True)]

    def _on_prefix(self, key: bytes, request: Request) -> Request:
        if not key or request.prefix is not None:
            return request
        state = self.get(key)
        return request if state is None else dataclasses.replace(request, prefix=state)

    @torch.inference_mode()
    def store(self, key: bytes, engine: Engine, item: CoarseResult, cache: KVCache | None = None) -> None:
        """Cache the prefix of a coarse pass, unless an entry of this key has as much already.

        Args:
            key: its `prefix_key`; b"" stores nothing.
            item: the coarse pass, before regions were read.
            cache: the finished prefill's keys and values of all layers, if there was one.
        """
        if key and self._wants(key, item):
            self.put(key, prefix_state(engine, item, cache))

    def _wants(self, key: bytes, item: CoarseResult) -> bool:
        """Whether a coarse pass went further than the entry: it is new, or more of its stacks were run."""
        entry = self.peek(key)
        if entry is None:
            return self.max_bytes > 0
        pairs = ((entry.gate, item.state.gate), (entry.region, item.state.region))
        return any(new.length and not old.length for old, new in pairs)


def prefix_key(engine: Engine, request: Request, tenant: str = "") -> bytes:
    """What decides a prefix: the tenant, the tokens up to the end of the last picture, the coarse budget, and every
    picture's mode, size and pixels; b"" for a request without pictures."""
    if not request.pictures:
        return b""
    image = engine.backbone.image_token_id
    last = len(request.ids) - 1 - request.ids[::-1].index(image)
    end = last + 1 + len(engine.backbone.image_delimiters[1])
    budgets = coarse_budgets(engine, request.options, request.pictures)
    facts = [tenant, request.ids[:end], [(budget.min_tokens, budget.max_tokens) for budget in budgets]]
    facts += [(picture.image.mode, picture.size_px) for picture in request.pictures]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for picture in request.pictures:
        digest.update(picture.digest or pixel_digest(picture.image))
    return digest.digest()


def prefix_state(engine: Engine, item: CoarseResult, cache: KVCache | None = None) -> State:
    """A copy of what a coarse pass computed up to the end of its last picture.

    Args:
        item: the coarse pass, before regions were read.
        cache: the finished prefill's keys and values of all layers; None leaves the upper layers to be run again.
    """
    end = prefix_length(engine.backbone, item.state.prompt)
    state = truncate(item.state, end)
    spans = tuple(dataclasses.replace(span, features=clone_features(span.features)) for span in state.prompt.spans)
    prompt = Prompt(state.prompt.ids[:end].clone(), state.prompt.positions[:, :end].clone(), spans)
    upper = LayerCache()
    if cache is not None:
        layers = range(engine.config.shared_layers, len(engine.backbone.layers))
        zoomed = [box.image for box in item.boxes] if item.gate.zoomed else []
        kept = min([end, *(spans[image].stop + len(engine.backbone.image_delimiters[1]) for image in zoomed)])
        upper = LayerCache(cache.truncated(kept).clone(layers), kept)
    return State(
        prompt,
        state.hidden.clone(),
        _cloned(state.shared),
        _cloned(state.gate),
        _cloned(state.region),
        upper,
        None,
        None if state.sink_query is None else state.sink_query.clone(),
        tuple(keys.clone() for keys in state.keys),
    )


def _cloned(stack: LayerCache) -> LayerCache:
    return LayerCache(stack.cache.clone(), stack.length)


def _size(state: State) -> int:
    tensors = [state.hidden, state.prompt.ids, state.prompt.positions, *state.keys]
    features = sum(features_bytes(span.features) for span in state.prompt.spans)
    stacks = (state.shared, state.gate, state.region, state.upper)
    return features + sum(t.numel() * t.element_size() for t in tensors) + sum(s.cache.nbytes for s in stacks)
