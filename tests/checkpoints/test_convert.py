import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from qzoom.backbones.qwen_vl import use_linear_patches
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.load import load_engine
from qzoom.config import BoxRule
from tests import tiny_models
from tests.checkpoints import folders
from tests.checkpoints.folders import refused

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; the shard index, whose order has no meaning, as parsed."""
    return {
        path.name: json.loads(path.read_text()) if path.name.endswith(".index.json") else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [None, 200_000])
def test_merged_to_ours_and_back_gives_the_same_files(family, dtype, shard_bytes, tmp_path):
    made = folders.engine(family, dtype)
    source = folders.write_merged(made, tmp_path / "merged", shard_bytes=shard_bytes)
    (source / "README.md").write_text("A card.")
    report = convert(source, tmp_path / "ours")
    assert (report.read_kind, report.written_kind, report.notes) == ("upstream", "adapter", ())
    assert report.tensors == len(folders.all_tensors(source))
    loaded = load_engine(tmp_path / "ours", dtype=dtype)
    assert folders.same_branches(made, loaded)
    assert folders.same_tensors(made.backbone.model.state_dict(), loaded.backbone.model.state_dict())
    assert loaded.config.replace(provenance={}) == load_engine(source).config.replace(provenance={})
    convert(tmp_path / "ours", tmp_path / "back")
    assert contents(source) == contents(tmp_path / "back")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_recorded_checkpoint_goes_there_and_back(family, tmp_path):
    if not (REFERENCE / family).is_dir():
        pytest.skip("the reference vectors are not beside the repository")
    source = tmp_path / "merged"
    shutil.copytree(REFERENCE / family / "processor", source)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(REFERENCE / family / "model" / name, source / name)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert contents(source) == contents(tmp_path / "back")


def test_large_branches_are_written_in_several_files(tmp_path, merged):
    convert(merged["qwen3_vl"], tmp_path / "ours", max_file_bytes=150_000)
    files = sorted((tmp_path / "ours").glob("qzoom-*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size < 160_000 for path in files)
    assert folders.same_branches(load_engine(tmp_path / "ours"), folders.engine("qwen3_vl"))
    convert(tmp_path / "ours", tmp_path / "back")
    assert contents(merged["qwen3_vl"]) == contents(tmp_path / "back")


def test_switched_off_gate_is_kept(tmp_path, merged):
    source = folders.copy(merged["qwen3_vl"], tmp_path / "merged")
    folders.edit_json(source / "config.json", enable_high_res=False)
    convert(source, tmp_path / "ours")
    assert load_engine(tmp_path / "ours").gate is None
    convert(tmp_path / "ours", tmp_path / "back")
    assert contents(source) == contents(tmp_path / "back")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_ours_to_merged_and_back_keeps_settings_and_bits(family, shard, tmp_path):
    made = folders.engine(family)
    config = made.config.replace(
        box=BoxRule(scaling="exact", components="all", max_regions=2), sink="none", provenance={"steps": 12}
    )
    made = dataclasses.replace(made, config=config)
    ours = save_pretrained(made, tmp_path / "ours", max_shard_size=shard)
    report = convert(ours, tmp_path / "merged")
    unused = 6 if family == "qwen3_vl" else 7
    assert len(report.notes) == 2
    assert report.notes[0].startswith(f"{unused} tensors")
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {fields[name] for name in ("twig_K", "twig_T", "high_res_K", "high_res_T")} == {3}
    assert (fields["enable_twig"], fields["enable_high_res"], fields["reuse_src_pos"]) == (True, True, False)
    stored = folders.all_tensors(tmp_path / "merged")
    prefix = folders.PREFIX[family]
    assert torch.equal(stored[f"{prefix}high_res_head.weight"], made.gate.head.weight)
    assert torch.equal(
        stored[f"{prefix}twig_layers.2.mlp.up_proj.weight"], stored[f"{prefix}layers.5.mlp.up_proj.weight"]
    )
    assert load_engine(tmp_path / "merged").config == config
    convert(tmp_path / "merged", tmp_path / "again")
    loaded = load_engine(tmp_path / "again")
    assert loaded.config == config
    kept = folders.all_tensors(tmp_path / "again")
    assert all(torch.equal(kept[name], value) for name, value in folders.all_tensors(ours).items())


def test_settings_of_the_release_need_no_extra_field(tmp_path):
    made = folders.engine("qwen3_vl")
    config = made.config.replace(gate_threshold=0.05, region_threshold=0.1, positions="aligned")
    save_pretrained(dataclasses.replace(made, config=config), tmp_path / "ours", compact=False)
    report = convert(tmp_path / "ours", tmp_path / "merged")
    assert report.notes == ()
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "qzoom" not in fields
    assert (fields["high_res_thresh"], fields["reuse_src_pos"]) == (0.05, True)
    assert load_engine(tmp_path / "merged").config.replace(provenance={}) == config


def test_adapter_that_refers_to_its_base_becomes_a_whole_merged_model(tmp_path, plain):
    made = folders.engine("qwen2_5_vl")
    ours = save_pretrained(made, tmp_path / "ours", base_id=str(plain["qwen2_5_vl"]), compact=False)
    convert(ours, tmp_path / "merged")
    loaded = load_engine(tmp_path / "merged")
    assert folders.same_branches(made, loaded)
    assert folders.same_tensors(made.backbone.model.state_dict(), loaded.backbone.model.state_dict())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("shard_bytes", [None, 200_000])
@pytest.mark.parametrize("start", ["upstream", "adapter"])
def test_answer_only_model_gives_the_same_logits_in_plain_transformers(family, shard_bytes, start, tmp_path):
    made = folders.engine(family)
    source = folders.write_merged(made, tmp_path / "merged", shard_bytes=shard_bytes)
    if start == "adapter":
        convert(source, tmp_path / "ours")
        source = tmp_path / "ours"
    report = convert(source, tmp_path / "plain", answer_only=True)
    assert report.written_kind == "plain"
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not set(folders.FIELDS) & set(config)
    names = folders.all_tensors(tmp_path / "plain")
    assert not [name for name in names if "twig" in name or "high_res" in name or name.startswith(("gate", "region"))]
    assert not list((tmp_path / "plain").glob("qzoom*"))
    model, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"]
    inputs = model_inputs(made, tiny_models.picture(3, 200, 150))
    use_linear_patches(model.model.visual)  # rounds as in the other model
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, made.backbone.model(**inputs).logits)
    assert (tmp_path / "plain" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert load_engine(tmp_path / "plain").region is None


def model_inputs(made: Any, image: Image.Image) -> dict[str, torch.Tensor]:
    """A prompt with one picture, as transformers wants it."""
    out = made.backbone.image_processor(images=[image], return_tensors="pt")
    count = int(out["image_grid_thw"].prod()) // 4
    text = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>Total?<|im_end|>\n"
    ids = torch.tensor([made.backbone.tokenizer.encode(text)])
    kinds = (ids == made.backbone.image_token_id).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **out}


def test_targets_that_hold_something_else_are_refused(tmp_path, merged):
    source = merged["qwen3_vl"]
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "notes.txt").write_text("mine")
    plain = tmp_path / "plain"
    convert(source, plain, answer_only=True)
    before = contents(plain)
    for target, said in ((busy, "other files"), (plain, "another kind (plain)"), (source, "in place")):
        with refused(said):
            convert(source, target)
    assert contents(plain) == before
    assert [path.name for path in busy.iterdir()] == ["notes.txt"]


def test_checkpoint_of_the_same_kind_is_replaced(tmp_path, merged):
    first = folders.write_merged(folders.engine("qwen3_vl"), tmp_path / "sharded", shard_bytes=200_000)
    convert(first, tmp_path / "ours")
    convert(merged["qwen3_vl"], tmp_path / "ours")
    convert(merged["qwen3_vl"], tmp_path / "fresh")
    assert contents(tmp_path / "ours") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("case", ["plain", "no model", "no region", "misshapen", "wrong T", "cut file", "no size"])
def test_what_cannot_be_converted_is_said_and_nothing_is_written(case, tmp_path, merged, plain):
    source = folders.copy(merged["qwen3_vl"], tmp_path / "source")
    said = {"plain": "plain model already", "no model": "no model", "no region": "no region branch"}.get(case, "")
    if case == "plain":
        source = plain["qwen3_vl"]
    elif case == "no model":
        shutil.rmtree(source)
        source.mkdir()
    elif case == "no region":
        made = dataclasses.replace(folders.engine("qwen3_vl"), region=None)
        source = save_pretrained(made, tmp_path / "ours")
    elif case == "misshapen":
        said = "twig_layers.1.mlp.up_proj.weight"
        tensors = folders.all_tensors(source)
        folders.rewrite(source, {n: v[:-8] if n.endswith(said) else v for n, v in tensors.items()})
    elif case == "wrong T":
        said = "T=2"
        folders.edit_json(source / "config.json", twig_T=2, high_res_T=2)
    elif case == "no size":
        said = "config.json has no hidden_size"
        inner = json.loads((source / "config.json").read_text())["text_config"]
        del inner["hidden_size"]
        folders.edit_json(source / "config.json", text_config=inner)
    else:
        said = "damaged"
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    with refused(said):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["fields", "settings", "shards", "names"])
def test_facts_of_the_release_that_are_none(name, tmp_path, merged):
    convert(merged["qwen3_vl"], tmp_path / "ours")
    path = tmp_path / "ours" / "qzoom_config.json"
    values = json.loads(path.read_text())
    values["zoom"]["provenance"]["released"][name] = 5
    path.write_text(json.dumps(values))
    with refused(f"provenance.released.{name} must be a"):
        convert(tmp_path / "ours", tmp_path / "back")
