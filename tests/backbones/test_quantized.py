import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qzoom.backbones import quantized
from qzoom.backbones.quantized import is_quantized, is_quantized_map, plain_weight
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.load import load_engine
from qzoom.errors import ConfigError
from qzoom.heads.branches import new_region
from qzoom.images.geometry import iou
from qzoom.model import QZoom
from qzoom.training.stages import StageRecipe
from qzoom.training.train_stage import train_stage
from tests import tiny_models
from tests.flow import request, run
from tests.training.conftest import make_world

pytest.importorskip("bitsandbytes")

BITS = ("4bit", "8bit")
PAGE = tiny_models.picture(31, 400, 300)
RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.jpg"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an adapter that refers to it, of two families."""
    out = {}
    for family in ("qwen3_vl", "qwen3_5"):
        engine = tiny_models.build_engine(family)
        base = tmp_path_factory.mktemp(family) / "base"
        save_pretrained(dataclasses.replace(engine, gate=None, region=None), base, include_base=True)
        out[family] = save_pretrained(engine, base.parent / "adapter", base_id=str(base))
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_the_decoder_alone_is_held_in_few_bits(folders, family, bits):
    plain = load_engine(folders[family], dtype="float32")
    few = load_engine(folders[family], dtype="float32", quantization=bits)
    maps = {name for name, module in few.backbone.model.named_modules() if is_quantized_map(module)}
    assert maps
    assert all(".layers." in name and "visual" not in name for name in maps), maps
    assert is_quantized(few.backbone)
    assert not is_quantized(plain.backbone)
    for ours, theirs in ((few.gate, plain.gate), (few.region, plain.region)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    one, other = (run(e, [request(e, PAGE, "What is the total?", zoom="always")])[0] for e in (few, plain))
    least = {"qwen3_vl": {"4bit": 0.9, "8bit": 0.99}, "qwen3_5": {"4bit": 0.5, "8bit": 0.95}}[family][bits]
    assert torch.nn.functional.cosine_similarity(one.logits, other.logits, dim=0) > least


@pytest.mark.parametrize("bits", BITS)
def test_the_embedded_model_reads_the_same_region(bits):
    plain, few = (QZoom.from_pretrained("tiny", dtype="float32", quantization=q) for q in (None, bits))
    one, other = (model.perceive(RECEIPT, "What is the total amount?") for model in (plain, few))
    assert iou(one.regions[0].box, other.regions[0].box) > 0.5
    assert other.gate.score == pytest.approx(one.gate.score, abs=0.2)


@pytest.mark.parametrize("bits", BITS)
def test_new_branches_are_plain_and_hold_what_the_base_computes_with(folders, bits):
    few = load_engine(folders["qwen3_vl"], dtype="float32", quantization=bits)
    region = new_region(few.backbone, 3, 3)
    assert not any(is_quantized_map(module) for module in region.modules())
    source, ours = few.backbone.layers[4].mlp.up_proj, region.layers[1].mlp.up_proj
    hidden = torch.randn(5, source.in_features)
    torch.testing.assert_close(ours(hidden), source(hidden), atol=0.05, rtol=0.05)
    torch.testing.assert_close(ours.weight.data, plain_weight(source, torch.float32))
    stored = load_engine(folders["qwen3_vl"], dtype="float32").backbone.layers[4].mlp.up_proj.weight
    assert (ours.weight - stored).norm() / stored.norm() < (0.15 if bits == "4bit" else 0.02)


@pytest.mark.parametrize(("bits", "most"), [("4bit", 0.012), ("8bit", 0.001)])
def test_a_large_bias_takes_nothing_from_the_plain_weights(bits, most):
    import bitsandbytes

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
    torch.nn.init.normal_(plain.weight, std=0.02)
    torch.nn.init.constant_(plain.bias, 100.0)  # as the keys of Qwen2.5-VL have
    kinds: dict[str, Any] = {
        "4bit": lambda: bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4"),
        "8bit": lambda: bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False),
    }
    few = kinds[bits]()
    few.load_state_dict(plain.state_dict())
    few = few.to("cpu")
    assert (plain_weight(few, torch.bfloat16) - plain.weight).abs().max() < most
    assert few.bias[0] == 100


def test_a_checkpoint_that_comes_quantised(folders, tmp_path):
    few = load_engine(folders["qwen3_vl"], dtype="bfloat16", quantization="4bit")
    folder = save_pretrained(few, tmp_path / "few", include_base=True)
    again = load_engine(folder)
    assert is_quantized(again.backbone)
    assert again.backbone.dtype == torch.bfloat16
    options: dict[str, Any] = {"zoom": "always", "max_new_tokens": 6}
    assert QZoom(again).ask(PAGE, "When?", **options).tokens == QZoom(few).ask(PAGE, "When?", **options).tokens
    with pytest.raises(ConfigError, match="quantised already; leave out quantization='8bit'"):
        load_engine(folder, quantization="8bit")


def test_lora_trained_on_four_bits_loads_on_any_form_of_the_base(tmp_path):
    world = make_world("qwen3_vl", tmp_path)
    recipe = StageRecipe(
        stage="answers",
        base=str(world / "base"),
        labels=(str(world / "mined"),),
        foreign_labels=True,
        quantization="4bit",
        lora_rank=4,
        batch=4,
        micro_batch=2,
        steps=2,
        learning_rate=1e-2,
        precision="float32",
        trackers=(),
        region_tokens=8,
    )
    train_stage(recipe, tmp_path / "run")
    trained = tmp_path / "run" / "model"
    base = load_engine(world / "base", dtype="float32", quantization="4bit")
    few, eight, whole = (load_engine(trained, dtype="float32", quantization=q) for q in ("4bit", "8bit", None))
    assert is_quantized(few.backbone)
    assert not is_quantized(whole.backbone)
    before, after, other, plain = (
        run(e, [request(e, PAGE, "When?", zoom="never")])[0].logits for e in (base, few, eight, whole)
    )
    assert not torch.allclose(before, after, atol=1e-3)
    for logits in (other, plain):
        assert torch.nn.functional.cosine_similarity(after, logits, dim=0) > 0.9


def test_bad_quantisations_are_one_sentence(folders, monkeypatch):
    with pytest.raises(ConfigError, match=r"'4bit', '8bit' or a quantization config .*, not '3bit'"):
        load_engine(folders["qwen3_vl"], quantization="3bit")
    with pytest.raises(ConfigError, match="set lora_rank"):
        StageRecipe(stage="answers", base="tiny", labels=("x",), quantization="4bit")
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes; .*qzoom\[quantized\]"):
        load_engine(folders["qwen3_vl"], quantization="4bit")
