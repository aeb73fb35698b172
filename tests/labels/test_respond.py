import pytest
import torch
from PIL import Image

from qzoom.config import TokenBudget
from qzoom.engine.attention import response_attention
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import DecodeBatch, prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.prompt import VisualSpan
from qzoom.labels.respond import sink_cells
from qzoom.types import SamplingParams
from tests.flow import request
from tests.tiny_models import FAMILIES, build_engine


def answered(engine):
    """A plain answer of five tokens: its look, its prompt's caches and its ids."""
    asked = request(
        engine,
        Image.effect_noise((150, 110), 90).convert("RGB"),
        "what is it?",
        zoom="never",
        coarse_tokens=TokenBudget(4, 20),
        sampling=SamplingParams(max_new_tokens=5),
    )
    clock = Stopwatch(engine.backbone.device)
    looks = coarse_pass(engine, [asked], clock)
    rows = prefill(engine, looks, clock)
    cache = rows[0].cache
    batch = DecodeBatch(engine.backbone, eos_ids=())
    batch.start(rows)
    while batch.rows:
        batch.step()
    return looks[0].state, cache, rows[0].tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_attention(family):
    engine = build_engine(family, heads=False)
    state, cache, tokens = answered(engine)
    found = response_attention(engine.backbone, state.prompt, cache, tokens[:-1], [1, 4])[0]

    prompt, span = state.prompt, state.prompt.spans[0]
    ids = torch.cat([prompt.ids, torch.tensor(tokens[:-1])])
    steps = torch.arange(len(tokens) - 1) + int(prompt.next_position)
    positions = torch.cat([prompt.positions, steps.expand(3, -1)], dim=1)
    eager = build_engine(family, heads=False, attn="eager").backbone
    features = span.features
    encoded = type(
        "Encoded",
        (),
        {"pooler_output": (features.tokens,), "deepstack_features": [(level,) for level in features.deepstack]},
    )()
    out = eager.model.model(
        input_ids=ids[None],
        position_ids=positions[:, None],
        mm_encoder_outputs={"image": encoded},
        output_attentions=True,
    )
    for n, layer in enumerate((1, 4)):
        shares = out.attentions[layer][0, :, len(prompt) :, span.start : span.stop].mean(1)
        torch.testing.assert_close(found.values[n].flatten(1), shares, atol=1e-6, rtol=1e-4)


def test_the_cache_stays_and_an_empty_response_is_refused():
    engine = build_engine("qwen3_vl", heads=False)
    state, cache, tokens = answered(engine)
    before = cache.layer(2)[0].clone()
    response_attention(engine.backbone, state.prompt, cache, tokens[:-1], [2])
    assert len(cache) == len(state.prompt)
    assert torch.equal(cache.layer(2)[0], before)
    engine = build_engine("qwen3_vl", heads=False)
    state, cache, _ = answered(engine)
    with pytest.raises(ValueError, match="at least one"):
        response_attention(engine.backbone, state.prompt, cache, [], [1])


def test_sinks_are_cells_with_an_outsized_state():
    engine = build_engine("qwen3_vl", heads=False)
    state, _, _ = answered(engine)
    span: VisualSpan = state.prompt.spans[0]
    hidden = torch.ones(len(state.prompt), 8)
    hidden[span.start + 3] *= 3.5
    hidden[span.start + 4] *= 2.5
    sinks = sink_cells(hidden, span)
    assert sinks.shape == span.features.grid
    assert sinks.flatten().nonzero().flatten().tolist() == [3]
