"""On a CUDA device: the same decisions, boxes and tokens as on the CPU, and bfloat16 that answers."""

import pytest
import torch

from qzoom.checkpoints.load import load_engine
from qzoom.engine.state import Engine
from qzoom.model import QZoom
from tests import tiny_models
from tests.flow import request, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SAMPLES = [(tiny_models.picture(i, 180 + 40 * i, 150), f"Question {i}: what is the total?") for i in range(5)]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    """cuDNN's convolutions round float32 to TF32 unless told otherwise; the patch embedding is one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_cuda(family: str, dtype: torch.dtype, attn: str = "sdpa") -> QZoom:
    made = tiny_models.build_engine(family, attn=attn)
    assert made.gate is not None
    assert made.region is not None
    made.backbone.model.to("cuda", dtype)
    return QZoom(Engine(made.backbone, made.gate.to("cuda", dtype), made.region.to("cuda", dtype), made.config))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_answers_are_those_of_the_cpu(family, attn, positions):
    models = [QZoom(tiny_models.build_engine(family, attn=attn)), on_cuda(family, torch.float32, attn)]
    for model in models:
        engine = model.engine
        config = engine.config.replace(positions=positions, region_threshold=0.45)
        model.engine = Engine(engine.backbone, engine.gate, engine.region, config)
    for zoom in ("auto", "always"):
        cpu, cuda = (model.ask_batch(SAMPLES, zoom=zoom, max_new_tokens=8) for model in models)
        alone = [models[1].ask(*sample, zoom=zoom, max_new_tokens=8) for sample in SAMPLES]
        for one, other, single in zip(cpu, cuda, alone, strict=True):
            assert other.tokens == one.tokens == single.tokens
            assert other.gate.zoomed == one.gate.zoomed
            assert [r.box for r in other.regions] == [r.box for r in one.regions]
            if one.gate.score is not None:
                assert other.gate.score == pytest.approx(one.gate.score, abs=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_bfloat16_sessions_answer(family):
    session = on_cuda(family, torch.bfloat16).session(SAMPLES[0][0])
    answer = session.ask("What?", zoom="always", region_threshold=0.3, max_new_tokens=6, temperature=0.7, seed=1)
    assert answer.gate.zoomed
    assert len(answer.tokens) == 6
    assert answer.usage.reused_tokens > 0
    assert all(ms > 0 for ms in answer.timing_ms.values())


def test_a_loaded_model_leaves_cudnns_attention_alone():
    assert load_engine("tiny", device_map="cuda").backbone.model.device.type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_variable_length_attention_gives_what_each_sequence_gives_alone(family):
    engine = on_cuda(family, torch.bfloat16).engine
    requests = [request(engine, image, question, zoom="never") for image, question in SAMPLES]
    alone = [run(engine, [one])[0].logits for one in requests]
    for logits, expected in zip(run(engine, requests), alone, strict=True):
        assert torch.nn.functional.cosine_similarity(logits.logits, expected, dim=0) > 0.999
