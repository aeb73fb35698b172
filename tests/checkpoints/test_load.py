import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzoom.checkpoints.base import choose_dtype
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import TensorInfo, WeightIndex
from qzoom.config import BoxRule, ZoomConfig
from qzoom.errors import ConfigError, DeviceError
from qzoom.model import QZoom
from tests import tiny_models
from tests.checkpoints import folders
from tests.checkpoints.folders import refused

PICTURE = tiny_models.picture(5, 300, 220)
DEEP = '{"a":' * 100_000
OUTSIDE = '{"weight_map": {"lm_head.weight": "../secret.safetensors"}}'


def test_what_onednn_keeps_is_bounded_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    load_engine("tiny")
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "128")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_merged_checkpoint_answers_like_the_model_it_was_made_of(family, merged):
    made = folders.engine(family)
    loaded = load_engine(merged[family], config=made.config)
    assert folders.same_branches(made, loaded)
    assert not any(p.requires_grad for part in (loaded.backbone.model, loaded.gate) for p in part.parameters())
    assert not loaded.backbone.model.training
    for zoom in ("auto", "always", "never"):
        one, two = (QZoom(e).ask(PICTURE, "What is the total?", zoom=zoom, max_new_tokens=6) for e in (made, loaded))
        assert (one.tokens, one.gate, one.regions) == (two.tokens, two.gate, two.regions)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_merged_config_fields_become_the_releases_arithmetic(family, merged):
    config = load_engine(merged[family]).config
    assert (config.shared_layers, config.branch_layers, config.gate_threshold) == (3, 3, 0.25)
    assert config.positions == "aligned"
    assert config.sink == {"qwen3_vl": "first_token", "qwen2_5_vl": "corner"}[family]
    assert config.box == BoxRule()
    assert config.provenance["released"]["fields"] == folders.FIELDS


def test_gate_that_the_config_switches_off_is_not_used(tmp_path, merged):
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    folders.edit_json(folder / "config.json", enable_high_res=False, reuse_src_pos=False)
    loaded = load_engine(folder)
    assert loaded.gate is None
    assert loaded.region is not None
    assert loaded.config.positions == "second_image"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_plain_base_model_loads_without_branches(family, plain):
    loaded = load_engine(plain[family])
    assert (loaded.gate, loaded.region) == (None, None)
    answer = QZoom(loaded).ask(PICTURE, "When?", zoom="never", max_new_tokens=4)
    made = QZoom(folders.engine(family)).ask(PICTURE, "When?", zoom="never", max_new_tokens=4)
    assert answer.tokens == made.tokens


def test_number_format_is_the_stored_one_or_the_one_asked_for(tmp_path, merged, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    stored = folders.write_merged(folders.engine("qwen3_vl", torch.bfloat16), tmp_path / "bf16")
    for folder, dtype, expected in (
        (merged["qwen3_vl"], "auto", torch.float32),
        (stored, "auto", torch.bfloat16),
        (stored, "float32", torch.float32),
        (merged["qwen3_vl"], torch.bfloat16, torch.bfloat16),
    ):
        loaded = load_engine(folder, dtype=dtype)
        assert loaded.backbone.dtype == expected
        assert {p.dtype for branch in (loaded.gate, loaded.region) for p in branch.parameters()} == {expected}
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    folders.rewrite(folder, {name: value.half() for name, value in folders.all_tensors(folder).items()})
    assert load_engine(folder).backbone.dtype == torch.float32


@pytest.mark.parametrize(
    ("machine", "capability", "million_numbers", "expected"),
    [
        ("x86_64", "AVX2", 1000, torch.float32),
        ("AMD64", "DEFAULT", 1000, torch.float32),
        ("x86_64", "AVX2", 1001, torch.bfloat16),  # over 4 GB in float32
        ("x86_64", "AVX512", 1000, torch.bfloat16),
        ("aarch64", "DEFAULT", 1000, torch.bfloat16),
    ],
)
def test_small_models_are_widened_where_the_cpu_computes_bfloat16_slowly(
    machine, capability, million_numbers, expected, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: machine)
    tensors = {"a": TensorInfo("model.safetensors", "BF16", (1000, 1000, million_numbers))}
    index = WeightIndex(Path(), "model", tensors, {}, sharded=False)
    assert choose_dtype("auto", torch.device("cpu"), index) == expected
    assert choose_dtype("bfloat16", torch.device("cpu"), index) == torch.bfloat16
    assert choose_dtype("auto", torch.device("cuda"), index) == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"dtype": "float16"}, DeviceError, "float16"),
        ({"dtype": torch.float16}, DeviceError, "float16"),
        ({"dtype": "int8"}, ConfigError, "'int8'"),
        ({"dtype": torch.float64}, ConfigError, "torch.float64"),
        ({"device_map": "balanced"}, DeviceError, "on one"),
        ({"device_map": {"model.visual": "cpu", "lm_head": "cuda:1"}}, DeviceError, "on one"),
        ({"device_map": "tpu"}, DeviceError, "'tpu'"),
        ({"device_map": "meta"}, DeviceError, "'meta'"),
        ({"device_map": "cuda:99"}, DeviceError, "cuda:99"),
        ({"attn_implementation": "flash_attention_2"}, DeviceError, "flash_attention_2"),
    ],
)
def test_unsupported_placement_is_refused(options, kind, said, merged):
    with refused(said, kind=kind):
        load_engine(merged["qwen3_vl"], **options)


def test_given_config_replaces_the_arithmetic_but_not_the_depths(merged, plain):
    own = load_engine(merged["qwen3_vl"]).config
    loaded = load_engine(merged["qwen3_vl"], config=own.replace(region_threshold=0.7, box=BoxRule(scaling="exact")))
    assert (loaded.config.region_threshold, loaded.config.box.scaling) == (0.7, "exact")
    for wrong, symbol in ((own.replace(shared_layers=2), "K=3"), (own.replace(branch_layers=2), "T=3")):
        with refused(symbol):
            load_engine(merged["qwen3_vl"], config=wrong)
    config = ZoomConfig(shared_layers=2, sink="none")
    assert load_engine(plain["qwen3_vl"], config=config).config == config
    for name in ("cpu", {"": "cpu"}, None):
        assert load_engine(merged["qwen3_vl"], device_map=name).backbone.device.type == "cpu"


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"twig_K": 7, "high_res_K": 7}, ["K=7", "7 layers"]), ({"twig_K": None}, ["no twig_K"]),
        ({"twig_K": "3"}, ["twig_K='3'"]), ({"twig_T": 0}, ["twig_T=0"]),
        ({"twig_T": 2, "high_res_T": 2}, ["T=2", "has 3"]), ({"high_res_K": 2}, ["high_res_K=2", "twig_K=3"]),
        ({"high_res_T": 2}, ["high_res_T=2", "twig_T=3"]), ({"high_res_thresh": 7}, ["gate_threshold", "7"]),
        ({"model_type": "llava_next"}, ["'llava_next'", "qwen3_vl"]), ({"model_type": []}, ["type []"]),
        ({"qzoom": {"zzz": 3}}, ["config.json: qzoom", "unknown key 'zzz'"]),
        ({"qzoom": [1]}, ["config.json: qzoom", "must be a mapping"]),
    ],
)  # fmt: skip
def test_wrong_config_fields_are_named(family, changes, said, tmp_path, merged):
    folder = folders.copy(merged[family], tmp_path / "model")
    folders.edit_json(folder / "config.json", **changes)
    with refused(*said):
        load_engine(folder)


def _without(part: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def _cut(part: str) -> Any:
    return lambda tensors: {name: value[..., :-8] if part in name else value for name, value in tensors.items()}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("high_res_layers.1.self_attn.q_proj.weight"), ["high_res_layers.1.self_attn.q_proj.weight"]),
        (_without("high_res_head.bias"), ["high_res_head.bias"]),
        (_without("twig_layers.0.mlp.up_proj"), ["twig_layers.0.mlp.up_proj.weight"]),
        (_without("twig_layers.2."), ["T=3", "has 2"]),
        (_without("twig_layers."), ["twig_layers"]),
        (_without("high_res_"), ["T=3", "gate has 0"]),
        (
            _cut("twig_layers.1.self_attn.k_proj.weight"),
            ["twig_layers.1.self_attn.k_proj.weight", "(32, 56)", "(32, 64)"],
        ),
        (_cut("high_res_head.weight"), ["high_res_head.weight", "(1, 56)"]),
        (_without("layers.4.mlp.down_proj"), ["layers.4.mlp.down_proj.weight"]),
        (_cut("layers.5.mlp.down_proj.weight"), ["layers.5.mlp.down_proj.weight"]),
        (lambda t: t | {n.replace("k_proj.w", "z_proj.w"): v for n, v in t.items() if "twig" in n}, ["z_proj"]),
    ],
)
def test_wrong_tensors_are_named(family, change, said, tmp_path, merged):
    folder = folders.copy(merged[family], tmp_path / "model")
    folders.rewrite(folder, change(folders.all_tensors(folder)))
    with refused(*said):
        load_engine(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pickled", "pytorch_model.bin"]),
        (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40), ["model.safetensors", "damaged"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "object"]),
        (lambda f: (f / "config.json").write_text(DEEP), ["model/config.json", "recursion"]),
        (lambda f: (f / "qzoom_config.json").write_text(DEEP), ["qzoom_config.json", "recursion"]),
        (lambda f: (f / "preprocessor_config.json").write_text(DEEP), ["preprocessor_config.json", "recursion"]),
        (lambda f: folders.edit_json(f / "preprocessor_config.json", patch_size=0), ["patch_size=0", "vision_config"]),
        (lambda f: folders.edit_json(f / "preprocessor_config.json", patch_size=14), ["patch_size=14", "16"]),
        (lambda f: folders.edit_json(f / "preprocessor_config.json", merge_size=4), ["merge_size=4", "2"]),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), ["eos_token_id='x'"]),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [[1]]}'), ["eos_token_id=[[1]]"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer"]),
        (lambda f: (f / "preprocessor_config.json").unlink(), ["preprocessor_config.json"]),
        (lambda f: (f / "chat_template.jinja").unlink(), ["chat template"]),
        (lambda f: (f / "chat_template.jinja").write_text("a\n{% if %}"), ["chat template", "not valid", "line 2"]),
        (lambda f: (f / "model.safetensors.index.json").write_text(OUTSIDE), ["weight_map"]),
        (
            lambda f: folders.edit_json(f / "preprocessor_config.json", image_mean=[float("nan")] * 3),
            ["model/preprocessor_config.json", "NaN", "no number"],
        ),
    ],
)
def test_missing_and_damaged_files_are_named(spoil, said, tmp_path, merged):
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    spoil(folder)
    with refused(*said):
        load_engine(folder)


def test_missing_shard_is_named(tmp_path):
    folder = folders.write_merged(folders.engine("qwen3_vl"), tmp_path / "model", shard_bytes=300_000)
    assert folders.same_branches(load_engine(folder), folders.engine("qwen3_vl"))
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with refused(lost.name):
        load_engine(folder)


def test_old_chat_template_file_is_read(tmp_path, merged):
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    assert load_engine(folder).backbone.chat_template == "{{ messages }}"


def test_processor_of_another_folder(tmp_path, merged):
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    loaded = load_engine(folder, processor=merged["qwen3_vl"])
    assert loaded.backbone.tokenizer.encode("total 3.50") == tiny_models.tokenizer().encode("total 3.50")


@pytest.mark.parametrize(
    ("ending", "value"),
    [
        ("twig_layers.1.self_attn.v_proj.weight", math.nan), ("high_res_head.bias", math.inf),
        ("layers.6.mlp.up_proj.weight", -math.inf), ("patch_embed.proj.bias", math.nan),
    ],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(value, ending, tmp_path, merged):
    folder = folders.copy(merged["qwen3_vl"], tmp_path / "model")
    tensors = folders.all_tensors(folder)
    name = next(name for name in tensors if name.endswith(ending) and ("twig" in ending or "twig" not in name))
    tensors[name].view(-1)[-1] = value
    folders.rewrite(folder, tensors)
    with refused(str(folder), name, "not numbers (NaN or infinity)", "fetch the file again"):
        load_engine(folder)


def test_what_is_no_number_is_named_as_stored(tmp_path, merged):
    folder = folders.copy(merged["qwen2_5_vl"], tmp_path / "model")
    tensors = folders.all_tensors(folder)
    name = next(name for name in tensors if name.endswith(".layers.1.mlp.up_proj.weight") and "twig" not in name)
    value = tensors.pop(name)
    value.view(-1)[-1] = math.nan
    renamed = {key: tensor for key, tensor in tensors.items() if "visual" in key or "twig" in key or "high" in key}
    old = {key.replace("model.language_model.", "model."): t for key, t in tensors.items() if key not in renamed}
    folders.rewrite(folder, renamed | old | {name.replace("model.language_model.", "model."): value})
    with refused(f"{name.replace('model.language_model.', 'model.')} in model.safetensors"):
        load_engine(folder)


def test_weights_of_an_adapter_that_are_no_numbers_are_refused(tmp_path, merged):
    folder = QZoom(load_engine(merged["qwen3_vl"])).save_pretrained(tmp_path / "adapter", include_base=True)
    whole = load_file(folder / "qzoom.safetensors")
    for file, name in (
        ("qzoom.safetensors", "gate.layers.1.self_attn.v_proj.weight"),
        ("model.safetensors", "lm_head.weight"),
    ):
        tensors = load_file(folder / file)
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, folder / file, {"format": "pt"})
        with refused(str(folder), name, file, "not numbers"):
            load_engine(folder)
        save_file(whole, folder / "qzoom.safetensors")
    path = folder / "qzoom_config.json"
    for word in ("NaN", "1e999"):
        path.write_text(re.sub(r'("region_threshold": )\S+,', rf"\g<1>{word},", path.read_text(), count=1))
        with refused(str(path), "no number" if word == "NaN" else "region_threshold must be a number"):
            load_engine(folder)
