"""The LLaVA file in docs/port-a-backbone.md works: it is read from the page and put through the engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qzoom.config import TokenBudget, ZoomConfig
from qzoom.engine.state import Engine
from qzoom.errors import BudgetError
from qzoom.heads.branches import new_gate, new_region
from qzoom.model import QZoom
from tests import tiny_models
from tests.flow import request, run

GUIDE = Path(__file__).parents[2] / "docs" / "port-a-backbone.md"
PAGE = tiny_models.picture(51, 150, 90)
QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QZoom:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    source = next(block for block in blocks if "class LlavaBackbone" in block)
    path = tmp_path_factory.mktemp("guide") / "llava_from_the_guide.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = LlamaConfig(
        vocab_size=len(tiny_models.tokenizer()),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tiny_models.token_id("<|im_end|>"),
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=84, patch_size=14
    )
    image_token = tiny_models.token_id("<|image_pad|>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token)
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.ndim >= 2:
            weight.normal_(0.0, 1.0 if "embed" in name else weight[0].numel() ** -0.5)
    made.generation_config.eos_token_id = tiny_models.token_id("<|im_end|>")
    made.generation_config.pad_token_id = 0
    template = tiny_models.TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    backbone = module.LlavaBackbone(made, tiny_models.tokenizer(), CLIPImageProcessorPil(), template)
    zoom = ZoomConfig(shared_layers=2, branch_layers=2, sink="none", region_threshold=0.4, positions="aligned")
    return QZoom(Engine(backbone, new_gate(backbone, 2, 2), new_region(backbone, 2, 2), zoom))


def plain(model: QZoom, count: int) -> list[int]:
    """transformers' greedy answer to the engine's own prompt about `PAGE`, squeezed to a square."""
    backbone = model.engine.backbone
    ids = run(model.engine, [request(model.engine, PAGE, QUESTION, zoom="never")])[0].after.state.prompt.ids[None]
    square = PAGE.resize((84, 84), 3)
    pixels = backbone.image_processor(images=[square], do_resize=False, do_center_crop=False, return_tensors="pt")
    out = backbone.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels["pixel_values"], max_new_tokens=count
    )
    return out[0, ids.shape[1] :].tolist()


def test_the_answer_is_transformers_own(model: QZoom) -> None:
    answer = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=8)
    assert answer.usage.coarse_tokens == 36
    assert list(answer.tokens) == plain(model, 8)


def test_it_zooms_and_a_session_and_a_batch_equal_single_calls(model: QZoom) -> None:
    options: dict[str, Any] = {"gate_threshold": 0.0, "max_new_tokens": 6}
    answer = model.ask(PAGE, QUESTION, **options)
    assert answer.gate.zoomed
    assert answer.usage.region_tokens == 36
    assert model.session(PAGE).ask(QUESTION, **options).tokens == answer.tokens
    other = (tiny_models.picture(52, 60, 200), "When, and where was it?")
    both = model.ask_batch([(PAGE, QUESTION), other], zoom=["auto", "never"], **options)
    assert both[0].tokens == answer.tokens
    assert both[1].tokens == model.ask(*other, zoom="never", max_new_tokens=6).tokens


def test_the_fused_prompt_equals_a_full_pass(model: QZoom) -> None:
    engine = dataclasses.replace(model.engine)
    found = run(engine, [request(engine, PAGE, QUESTION, zoom="always")])[0]
    state = found.after.state
    hidden = engine.backbone.embed(state.prompt.ids)
    for span in state.prompt.spans:
        hidden[span.start : span.stop] = span.features.tokens
    with torch.inference_mode():
        out = engine.backbone.model.model.language_model(inputs_embeds=hidden[None], use_cache=False)
        expected = engine.backbone.model.lm_head(out.last_hidden_state[0, -1])
    assert len(state.prompt.spans) == 2
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=0)


def test_a_budget_that_excludes_its_grid_is_refused(model: QZoom) -> None:
    with pytest.raises(BudgetError, match="36 visual tokens"):
        model.ask(PAGE, QUESTION, coarse_tokens=TokenBudget(1, 20))
