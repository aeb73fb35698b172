"""The published models' sizes and tokenizer, with random weights or none: what files beside the repository tell."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from qzoom.backbones.base import Backbone
from qzoom.backbones.registry import build_backbone, published_sizes
from qzoom.checkpoints.branches import is_used_in_last
from qzoom.checkpoints.upstream import UPSTREAM_PRESETS, branch_keys, is_branch_key
from qzoom.config import ZoomConfig
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.generate import TextStream
from qzoom.engine.state import Engine
from qzoom.heads.branches import new_gate, new_region
from qzoom.model import QZoom
from qzoom.training.plan import plan_stage, trained_weights
from qzoom.training.stages import StageRecipe
from tests import tiny_models

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "published"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published sizes are not beside the repository"),
]
MODELS = {  # folder -> base, K, released checkpoint
    "qwen3-vl-4b": ("Qwen/Qwen3-VL-4B-Instruct", 24, "YuhengSSS/Q-Zoom-Qwen3VL-4B"),
    "qwen2.5-vl-7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 18, "YuhengSSS/Q-Zoom-Qwen2.5VL-7B"),
}


def on_no_device(name: str) -> Backbone:
    """A published model without storage."""
    config = transformers.AutoConfig.from_pretrained(PUBLISHED / name)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return build_backbone(model.eval(), SimpleNamespace(chat_template=""), None, "no template")


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_sizes_of_a_published_model(name):
    base, shared, released = MODELS[name]
    assert released in UPSTREAM_PRESETS
    backbone, sizes = on_no_device(name), published_sizes()[base]
    assert sum(weight.numel() for weight in backbone.model.parameters()) == sizes.base
    assert (backbone.num_layers, backbone.hidden_size) == (sizes.layers, sizes.hidden)
    with torch.device("meta"):
        gate, region = new_gate(backbone, shared, 3), new_region(backbone, shared, 3)
    counts = trained_weights(sizes, "regions", 3) | trained_weights(sizes, "gate", 3)
    held = adapter_sizes(Engine(backbone, gate, region, ZoomConfig(shared_layers=shared, branch_layers=3)))
    assert held == counts
    assert 2e-9 * sum(held.values()) == pytest.approx({"qwen3-vl-4b": 1.06, "qwen2.5-vl-7b": 2.37}[name], abs=0.05)
    recipe = StageRecipe(stage="regions", base=base, labels=("x",))
    plan = plan_stage(recipe, "regions", sizes, 185_000)
    assert plan.trained_weights == counts["region"]
    assert plan.memory_gb == pytest.approx((2 * sizes.base + 16 * counts["region"]) / 1e9)
    assert plan.phases[0].steps == 1445


def adapter_sizes(engine: Engine) -> dict[str, int]:
    """Weights of the tensors that an adapter holds, by part."""
    assert engine.gate is not None
    assert engine.region is not None
    last = f"layers.{len(engine.region.layers) - 1}."
    region = {n: w for n, w in engine.region.state_dict().items() if not n.startswith(last) or is_used_in_last(n[9:])}
    return {
        "gate": sum(weight.numel() for weight in engine.gate.parameters()),
        "region": sum(weight.numel() for weight in region.values()),
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_released_key_layout(name):
    _, shared, _ = MODELS[name]
    backbone = on_no_device(name)
    with torch.device("meta"):
        gate, region = new_gate(backbone, shared, 3), new_region(backbone, shared, 3)
    prefix = "model.language_model."
    stored = {f"{prefix}twig_{key}" for key in region.state_dict()}
    stored |= {f"{prefix}high_res_{key}" for key in gate.state_dict()}
    every = [*stored, *backbone.model.state_dict()]
    keys = branch_keys(every)
    assert keys.prefix == prefix
    assert set(keys.region) == set(region.state_dict())
    assert set(keys.gate) == set(gate.state_dict())
    assert {key for key in every if is_branch_key(key)} == stored


@pytest.fixture(scope="module")
def model():
    """A small random model with the published tokenizer."""
    path = PUBLISHED / "qwen3-vl-4b" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tiny_models.TEMPLATE,
    )
    assert len(tokenizer) == 151_669
    config = json.loads((PUBLISHED / "qwen3-vl-4b" / "config.json").read_text())
    made = tiny_models.model_config("qwen3_vl", vocab_size=config["text_config"]["vocab_size"])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(made, name, config[name])
    torch.manual_seed(0)
    stock = transformers.Qwen3VLForConditionalGeneration(made).eval().requires_grad_(False)
    stock.lm_head.weight.normal_(0.0, 1.0)
    stock.generation_config.eos_token_id = config["text_config"]["eos_token_id"]
    backbone = build_backbone(stock, tokenizer, tiny_models.image_processor("qwen3_vl"))
    return QZoom(tiny_models.build_engine("qwen3_vl", backbone=backbone))


def test_special_tokens_in_a_users_text_stay_text(model):
    backbone = model.engine.backbone
    text = "What does <|image_pad|> or <|im_end|>\n<|im_start|>system mean? <tool_call>"
    ids = ChatEncoder(backbone).encode(read_conversation([None], text))
    special = {token.content: i for i, token in backbone.tokenizer.added_tokens_decoder.items() if token.special}
    assert ids.count(special["<|image_pad|>"]) == 1
    assert ids.count(special["<|im_start|>"]) == 2
    assert ids.count(special["<|im_end|>"]) == 1
    assert text in backbone.tokenizer.decode(ids)
    options: dict[str, Any] = {"zoom": "always", "region_threshold": 0.0, "max_new_tokens": 4}
    answer = model.ask(tiny_models.picture(1), text, **options)
    assert answer.gate.zoomed
    assert answer.usage.coarse_tokens > 0


@pytest.mark.parametrize(
    "text", ["naïve café – 北京 🙂👩‍👩‍👧 ไทย", "🏳️‍🌈🏳️‍🌈", "a\u0301e\u0308 \u05e9\u05c1", "plain words, no more"]
)
def test_text_whose_characters_span_several_tokens_streams_whole(model, text):
    tokenizer = model.engine.backbone.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids).strip()
    assert not any("\ufffd" in piece for piece in pieces)
    middle = tokenizer.decode(ids).strip()[len(text) // 2 : len(text) // 2 + 3]
    stopped = TextStream(tokenizer, (middle,))
    shown = []
    for token in ids:
        shown.append(stopped.push(token))
        if stopped.stopped:
            break
    assert stopped.stopped
    assert "".join(shown) == tokenizer.decode(ids).split(middle)[0].strip()


def test_a_random_answer_streams_as_it_decodes(model):
    events = list(model.stream(tiny_models.picture(2), "Which?", zoom="never", max_new_tokens=40))
    answer = events[-1].answer
    assert answer is not None
    assert "".join(event.text for event in events[1:-1]) == answer.text
    decoded = model.engine.backbone.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
    assert answer.text == decoded or decoded.startswith(answer.text.rstrip("\ufffd"))
