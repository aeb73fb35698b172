import itertools
from types import SimpleNamespace

import pytest
import torch

from qzoom.backbones import qwen_vl
from qzoom.backbones.registry import build_backbone
from qzoom.config import TokenBudget
from qzoom.engine.cache import KVCache
from qzoom.engine.layers import SequenceSlice, run_layers
from qzoom.engine.state import State, advance_shared
from qzoom.errors import CheckpointError
from tests import tiny_models
from tests.flow import request, run
from tests.plain import plain_inputs

PICTURES = [tiny_models.picture(1, 200, 140), tiny_models.picture(2, 60, 230), tiny_models.picture(3, 33, 33)]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompt_and_positions_are_those_of_transformers(family, count):
    engine = tiny_models.engine(family)
    pictures = PICTURES[:count]
    inputs = plain_inputs(engine.backbone, pictures, "What is the total?")
    prompt = run(engine, [request(engine, pictures, "What is the total?", zoom="never")])[0].after.state.prompt
    assert prompt.ids.tolist() == inputs["input_ids"][0].tolist()
    expected, _ = engine.backbone.model.model.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        mm_token_type_ids=inputs["mm_token_type_ids"],
        attention_mask=inputs["attention_mask"],
    )
    assert torch.equal(prompt.positions, expected[:, 0])


def _joined(level):
    return level if isinstance(level, torch.Tensor) else torch.cat(list(level))


@pytest.mark.parametrize("split", [False, True])
def test_deepstack_features_are_each_pictures_own_in_every_release(split, monkeypatch):
    """Up to transformers 5.17 a level is one tensor over all pictures, later a tensor for each."""
    backbone = tiny_models.engine("qwen3_vl").backbone
    core = backbone.model.model
    stock = core.get_image_features

    def other(*args, **kwargs):
        out = stock(*args, **kwargs)
        counts = [len(tokens) for tokens in out.pooler_output]
        levels = [_joined(level) for level in out.deepstack_features]
        out.deepstack_features = [level.split(counts) if split else level for level in levels]
        return out

    expected = backbone.encode(PICTURES, [None] * 3)
    monkeypatch.setattr(core, "get_image_features", other)
    for one, wanted in zip(backbone.encode(PICTURES, [None] * 3), expected, strict=True):
        assert [level.shape for level in one.deepstack] == [one.tokens.shape] * 3
        assert all(torch.equal(a, b) for a, b in zip(one.deepstack, wanted.deepstack, strict=True))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_encode_is_the_models_own_vision_path(family):
    backbone = tiny_models.engine(family).backbone
    inputs = plain_inputs(backbone, PICTURES, "?")
    with torch.inference_mode():
        own = backbone.model.model.get_image_features(
            inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
        )
        found = backbone.encode(PICTURES, [None] * 3)
        alone = [backbone.encode([p], [None])[0] for p in PICTURES]
    levels = [_joined(level) for level in getattr(own, "deepstack_features", None) or []]
    edges = [0, *itertools.accumulate(len(one.tokens) for one in found)]
    assert backbone.deepstack_levels == len(levels) == (3 if family == "qwen3_vl" else 0)
    for i, (one, single) in enumerate(zip(found, alone, strict=True)):
        assert torch.equal(one.tokens, own.pooler_output[i])
        rows = slice(edges[i], edges[i + 1])
        assert len(one.deepstack) == len(levels)
        assert all(torch.equal(mine, level[rows]) for mine, level in zip(one.deepstack, levels, strict=True))
        assert one.grid[0] * one.grid[1] == one.tokens.shape[0]
        assert one.size_px == (one.grid[1] * backbone.token_px, one.grid[0] * backbone.token_px)
        torch.testing.assert_close(one.tokens, single.tokens, atol=1e-5, rtol=0)


@pytest.mark.parametrize("most", [1, 100, 10_000])
def test_groups_of_pictures_are_encoded_as_one_call_does(most, monkeypatch):
    backbone, pictures = tiny_models.engine("qwen3_vl").backbone, PICTURES * 2
    expected = backbone.encode(pictures, [None] * 6)
    monkeypatch.setitem(qwen_vl._GROUP_PATCHES, "cpu", most)
    for one, other in zip(backbone.encode(pictures, [None] * 6), expected, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=0)
        assert (one.grid, one.size_px, len(one.deepstack)) == (other.grid, other.size_px, len(other.deepstack))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(("low", "high"), [(1, 4), (9, 9), (30, 40), (7, 7)])
def test_encode_stays_within_a_budget(family, low, high):
    backbone = tiny_models.engine(family).backbone
    strips = PICTURES + [tiny_models.picture(i, w, h) for i, w, h in ((4, 600, 8), (5, 8, 600), (6, 900, 900))]
    with torch.inference_mode():
        for features in backbone.encode(strips, [TokenBudget(low, high)] * len(strips)):
            assert low <= features.tokens.shape[0] <= high


def test_without_pictures_nothing_is_encoded():
    assert tiny_models.engine("qwen3_vl").backbone.encode([], []) == []


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_default_budget_is_the_processors_limits(family):
    assert tiny_models.engine(family).backbone.default_budget() == TokenBudget(4, 30)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_query_and_key_give_the_attention_weights(family):
    backbone = tiny_models.engine(family, attn="eager").backbone
    layer = backbone.layers[2]
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, tiny_models.HIDDEN)
    positions = torch.randint(0, 20, (3, 2, 9))
    rotary = backbone.rotary(hidden, positions)
    with torch.inference_mode():
        _, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
        query, key = backbone.query(layer, hidden, rotary), backbone.key(layer, hidden, rotary)
    assert query.shape == (2, 4, 9, 16)
    assert key.shape == (2, 2, 9, 16)
    own = (query @ key.repeat_interleave(2, dim=1).mT * 16**-0.5).softmax(-1)
    torch.testing.assert_close(own, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_key_value_are_what_the_layer_puts_in_its_cache(family):
    backbone = tiny_models.engine(family).backbone
    layer = backbone.layers[1]
    torch.manual_seed(0)
    hidden = torch.randn(1, 7, tiny_models.HIDDEN)
    rotary = backbone.rotary(hidden, torch.arange(7).expand(3, 1, -1))

    class Recorder:
        def update(self, key, value, index, *_, **__):
            self.seen = (key, value, index)
            return key, value

    cache = Recorder()
    with torch.inference_mode():
        backbone.run_layer(layer, hidden, rotary, None, cache)
        key, value = backbone.key_value(layer, hidden, rotary)
    assert cache.seen[2] == 1
    torch.testing.assert_close(key, cache.seen[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(value, cache.seen[1], atol=1e-6, rtol=0)
    assert torch.equal(key, backbone.key(layer, hidden, rotary))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_layer_by_layer_is_the_whole_forward_pass(family, attn):
    engine = tiny_models.engine(family, attn=attn)
    backbone = engine.backbone
    inputs = plain_inputs(backbone, PICTURES[:2], "What is the date?")
    with torch.inference_mode():
        expected = backbone.model(**inputs, output_hidden_states=True, use_cache=False)
        one = run(engine, [request(engine, PICTURES[:2], "What is the date?", zoom="never")])[0]
        state = one.after.state
        row = SequenceSlice(state.hidden, state.prompt.positions, KVCache(), 0)
        whole = run_layers(backbone, engine.upper, [row])[0]
    torch.testing.assert_close(backbone.lm_logits(whole.hidden), expected.logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(one.logits, expected.logits[0, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shared_layers", [1, 2, 4])
def test_deepstack_reaches_past_the_shared_layers(shared_layers):
    engine = tiny_models.engine("qwen3_vl", shared_layers=shared_layers)
    inputs = plain_inputs(engine.backbone, PICTURES[:1], "Which?")
    with torch.inference_mode():
        expected = engine.backbone.model(**inputs, use_cache=False).logits[0, -1]
    one = run(engine, [request(engine, PICTURES[:1], "Which?", zoom="never")])[0]
    torch.testing.assert_close(one.logits, expected, atol=1e-4, rtol=0)
    assert one.after.state.hidden.shape == (inputs["input_ids"].shape[1], tiny_models.HIDDEN)


def test_hidden_states_reach_exactly_the_shared_layers():
    engine = tiny_models.engine("qwen2_5_vl", shared_layers=3)
    prompt = run(engine, [request(engine, None, "Hello there", zoom="never")])[0].after.state.prompt
    with torch.inference_mode():
        state = advance_shared(engine, [State.empty(engine, prompt)])[0]
        expected = engine.backbone.model(input_ids=prompt.ids[None], output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(state.hidden, expected.hidden_states[3][0], atol=1e-5, rtol=0)
    stranger = SimpleNamespace(config=SimpleNamespace(model_type="llava_next"))
    with pytest.raises(CheckpointError, match=r"'llava_next'.*qwen2_5_vl, qwen3_vl"):
        build_backbone(stranger, None, None)
