import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.cache import LRUCache
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.engine.zoom import Crop, encode_crops, features_bytes
from qzoom.model import QZoom
from qzoom.types import Answer
from tests import tiny_models

PAGE = tiny_models.picture(41, 320, 260)
BUDGET = TokenBudget(4, 16)


@pytest.fixture(scope="module")
def model():
    base = tiny_models.engine("qwen3_vl")
    return QZoom(dataclasses.replace(base, config=base.config.replace(region_threshold=0.45)))


@contextmanager
def encoded(model: QZoom) -> Iterator[list[int]]:
    """The calls of the vision encoder inside the block, as a growing list."""
    calls: list[int] = []
    visual = model.engine.backbone.model.model.visual
    handle = visual.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def crop(**other: Any) -> Crop:
    return dataclasses.replace(Crop(PAGE, 0, (10, 20, 150, 120), BUDGET, b"p"), **other)


@torch.inference_mode()
def test_only_new_crops_are_encoded_and_all_come_back_in_order(model):
    backbone = model.engine.backbone
    kept = LRUCache(2**24, features_bytes)
    crops = [crop(), crop(box=(60, 0, 320, 90)), crop(number=1)]
    wanted = [backbone.encode([c.picture.crop(c.box)], [c.budget])[0] for c in crops]
    encode_crops(backbone, crops[1:2], kept)
    with encoded(model) as calls:
        found = [encode_crops(backbone, crops, kept) for _ in range(2)]
    assert len(calls) == 1
    for features in found:
        for one, other in zip(features, wanted, strict=True):
            assert (one.grid, one.size_px) == (other.grid, other.size_px)
            assert torch.allclose(one.tokens, other.tokens, atol=1e-5)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.deepstack, other.deepstack, strict=True))
    assert (kept.hits, kept.misses, kept.entries) == (4, 3, 3)
    assert kept.nbytes == sum(features_bytes(features) for features in wanted)


@pytest.mark.parametrize(
    "other", [{"prefix": b"q"}, {"number": 1}, {"box": (10, 20, 150, 121)}, {"budget": TokenBudget(4, 15)}]
)
def test_every_fact_decides_the_key(other):
    assert crop().key == crop(picture=PAGE.copy()).key
    assert crop().key != crop(**other).key


@torch.inference_mode()
def test_without_a_prefix_nothing_is_kept(model):
    kept = LRUCache(2**24, features_bytes)
    for _ in range(2):
        encode_crops(model.engine.backbone, [crop(prefix=b"")], kept)
    assert (kept.hits, kept.misses, kept.entries) == (0, 0, 0)


def ask(model: QZoom, cache: PrefixCache, tenant: str, **options: Any) -> Answer:
    batch = ContinuousBatch(model.engine, cache=cache)
    request = model.request(PAGE, "What is the total?", max_new_tokens=6, **options)
    events = list(batch.add({0: request}, {0: prefix_key(model.engine, request, tenant)}))
    while batch.keys:
        events += batch.step()
    answer = events[-1][1].answer
    assert answer is not None
    return answer


def test_a_box_that_is_asked_again_costs_no_encoding_and_gives_the_same_answer(model):
    cache = PrefixCache(2**24)
    wanted = model.ask(PAGE, "What is the total?", zoom="always", max_new_tokens=6)
    assert wanted.regions
    for tenant, calls_wanted in (("ann", 2), ("ann", 0), ("bob", 2), ("ann", 0)):
        with encoded(model) as calls:
            found = ask(model, cache, tenant, zoom="always")
        assert len(calls) == calls_wanted
        assert found.tokens == wanted.tokens
        assert found.regions == wanted.regions
    assert (cache.regions.hits, cache.regions.entries) == (2, 2)
    with encoded(model) as calls:
        other = ask(model, cache, "ann", zoom="always", region_tokens=7)
    assert len(calls) == 1
    again = model.ask(PAGE, "What is the total?", zoom="always", region_tokens=7, max_new_tokens=6)
    assert (other.tokens, other.regions) == (again.tokens, again.regions)


def test_regions_share_the_prefixes_bound(model):
    cache = PrefixCache(2**20)
    assert cache.max_bytes + cache.regions.max_bytes == 2**20
    nothing = PrefixCache(0)
    ask(model, nothing, "ann", zoom="always")
    assert (nothing.entries, nothing.regions.entries) == (0, 0)
