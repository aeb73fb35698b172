import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qzoom.model
from qzoom.checkpoints.adapter import push_to_hub, save_pretrained
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.writing import atomic_folder
from qzoom.config import BoxRule, Preset, TokenBudget
from qzoom.errors import CheckpointError, ConfigError
from qzoom.training.run import base_of
from tests import tiny_models
from tests.checkpoints import folders
from tests.checkpoints.folders import refused

PICTURE = tiny_models.picture(8, 260, 180)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", ["5GB", "150KB"])
def test_round_trip_keeps_every_bit(family, dtype, shard, tmp_path):
    made = folders.engine(family, dtype)
    config = made.config.replace(
        box=BoxRule(scaling="exact", threshold="relative", components="all", max_regions=3, margin_cells=0.5),
        coarse_tokens=TokenBudget(4, 20),
        presets={"document": Preset(0.05, 0.125)},
        provenance={"labels": "own attention", "steps": 400},
    )
    made = dataclasses.replace(made, config=config)
    folder = save_pretrained(made, tmp_path / "adapter", compact=False, max_shard_size=shard)
    assert (len(list(folder.glob("qzoom*.safetensors"))) > 1) == (shard != "5GB")
    loaded = load_engine(folder, dtype=dtype)
    assert folders.same_branches(made, loaded)
    assert folders.same_tensors(made.backbone.model.state_dict(), loaded.backbone.model.state_dict())
    assert loaded.config == config
    text = "What is the total? 3.50 <|im_end|>"
    assert loaded.backbone.tokenizer.encode(text) == made.backbone.tokenizer.encode(text)
    assert loaded.backbone.chat_template == made.backbone.chat_template
    assert loaded.backbone.default_budget() == made.backbone.default_budget()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_compact_adapter_leaves_out_only_what_is_never_used(family, tmp_path):
    made = folders.engine(family)
    folder = save_pretrained(made, tmp_path / "adapter")
    stored = folders.all_tensors(folder)
    last = {name.removeprefix("region.layers.2.") for name in stored if name.startswith("region.layers.2.")}
    expected = {"input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight"}
    more = {"q_norm.weight", "k_norm.weight"} if family == "qwen3_vl" else {"q_proj.bias", "k_proj.bias"}
    assert last == expected | {f"self_attn.{name}" for name in more}
    loaded = load_engine(folder)
    one, two = (
        qzoom.model.QZoom(e).ask(PICTURE, "What is the total?", zoom="always", max_new_tokens=5) for e in (made, loaded)
    )
    assert (one.tokens, one.regions) == (two.tokens, two.regions)
    again = save_pretrained(loaded, tmp_path / "again")
    assert folders.same_tensors(folders.all_tensors(folder), folders.all_tensors(again))


def test_branches_of_a_merged_checkpoint_are_saved_whole(tmp_path, merged):
    loaded = load_engine(merged["qwen3_vl"])
    folder = save_pretrained(loaded, tmp_path / "adapter")
    assert folders.same_branches(loaded, load_engine(folder))
    assert not {"twig_K", "enable_high_res"} & set(json.loads((folder / "config.json").read_text()))
    assert load_engine(folder).config == loaded.config


def test_adapter_refers_to_its_base(tmp_path, plain):
    made = folders.engine("qwen2_5_vl")
    folder = save_pretrained(made, tmp_path / "adapter", base_id=str(plain["qwen2_5_vl"]))
    assert sorted(p.name for p in folder.iterdir()) == ["qzoom.safetensors", "qzoom_config.json"]
    about = json.loads((folder / "qzoom_config.json").read_text())
    assert about["base"] == {
        "id": str(plain["qwen2_5_vl"].resolve()), "revision": None, "family": "qwen2_5_vl", "hidden_size": 64,
        "layers": 7,
    }  # fmt: skip
    loaded = load_engine(folder)
    assert folders.same_tensors(made.backbone.model.state_dict(), loaded.backbone.model.state_dict())


def test_an_adapter_beside_its_base_or_in_a_neighbouring_folder(tmp_path):
    made = folders.engine("qwen3_vl")
    folders.write_plain(made, tmp_path / "moved" / "base")
    folder = save_pretrained(made, tmp_path / "moved" / "adapter", base_id="owner/base")
    change_config(folder, lambda v: v["base"].update(id="../base"))
    assert load_engine(folder).region is not None
    made = folders.engine("qwen3_vl")
    folder = folders.write_plain(made, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_pretrained(made, folder, base_id=".")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert folders.same_branches(load_engine(save_pretrained(made, tmp_path / "whole")), load_engine(folder))


@pytest.mark.parametrize("own_name", [True, False])
def test_an_adapter_beside_its_base_is_replaced_and_the_base_stays(own_name, tmp_path):
    made = folders.engine("qwen3_vl")
    folder = folders.write_plain(made, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_pretrained(made, folder, base_id=".", max_shard_size="150KB")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text("{}")
    changed = dataclasses.replace(made, gate=None, config=made.config.replace(region_threshold=0.3))
    save_pretrained(changed, folder, base_id=str(folder) if own_name else ".", compact=False)
    added = {"qzoom.safetensors", "qzoom_config.json"}
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in added} == before
    loaded = load_engine(folder)
    assert folders.same_branches(loaded, changed)
    assert loaded.config == changed.config


def test_only_a_folder_with_a_base_takes_an_adapter_beside_it(tmp_path):
    made = folders.engine("qwen3_vl")
    folder = save_pretrained(made, tmp_path / "adapter", base_id="owner/base")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with refused("no base model"):
        save_pretrained(made, folder, base_id=".")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_base_from_a_relative_folder_is_no_hub_id_elsewhere(tmp_path, plain, monkeypatch):
    (tmp_path / "models").symlink_to(plain["qwen3_vl"].parent)
    monkeypatch.chdir(tmp_path)
    model = qzoom.model.QZoom.from_pretrained("models/qwen3_vl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = model.save_pretrained("adapter")
    assert json.loads((folder / "qzoom_config.json").read_text())["base"]["id"] == "."
    assert base_of(model.engine) == str(plain["qwen3_vl"].resolve())


def test_the_revision_of_the_base_that_was_loaded_can_be_named(tmp_path, monkeypatch):
    made = folders.engine("qwen3_vl")
    monkeypatch.setattr(made.backbone.model.config, "_name_or_path", "owner/base")
    monkeypatch.setattr(made.backbone.model.config, "_commit_hash", "main", raising=False)
    for given, written in ((None, "main"), ("v2", "v2")):
        folder = save_pretrained(made, tmp_path / "adapter", base_revision=given)
        base = json.loads((folder / "qzoom_config.json").read_text())["base"]
        assert (base["id"], base["revision"]) == ("owner/base", written)


def test_replacing_an_adapter_keeps_the_readers_own_files(tmp_path):
    made = folders.engine("qwen3_vl")
    folder = save_pretrained(made, tmp_path / "adapter", max_shard_size="150KB")
    (folder / "README.md").write_text("Read me.")
    (folder / "plots").mkdir()
    (folder / "plots" / "curve.txt").write_text("1 2 3")
    save_pretrained(made, folder)
    assert (folder / "README.md").read_text() == "Read me."
    assert (folder / "plots" / "curve.txt").read_text() == "1 2 3"
    assert [p.name for p in folder.glob("qzoom*.safetensors")] == ["qzoom.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_options_of_saving_that_nobody_knows(tmp_path):
    model = qzoom.model.QZoom(folders.engine("qwen3_vl"))
    with pytest.raises(ConfigError, match="save_pretrained has no option 'safe_serialization'; known keys: base_id, "):
        model.save_pretrained(tmp_path / "mine", safe_serialization=True)
    with pytest.raises(ConfigError, match=r"push_to_hub has no option 'base_ids'; did you mean 'base_id'\?"):
        model.push_to_hub("owner/name", base_ids="owner/base")
    assert not list(tmp_path.iterdir())


def test_model_saves_and_loads_itself_also_without_gate(tmp_path):
    model = qzoom.model.QZoom(folders.engine("qwen3_vl"))
    loaded = qzoom.model.QZoom.from_pretrained(model.save_pretrained(tmp_path / "mine"))
    one, two = (m.ask(PICTURE, "When?", zoom="always", max_new_tokens=5) for m in (model, loaded))
    assert (one.text, one.tokens, one.regions) == (two.text, two.tokens, two.regions)
    made = dataclasses.replace(folders.engine("qwen3_vl"), gate=None)
    loaded = load_engine(save_pretrained(made, tmp_path / "adapter"))
    assert loaded.gate is None
    assert loaded.region is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update(format_version=3), ["format version 3", "upgrade qzoom"]),
        (lambda v: v.pop("format_version"), ["format_version"]),
        (lambda v: v.update(gates=True), ["unknown key 'gates'", "did you mean 'gate'?"]),
        (lambda v: v["zoom"].update(gate_treshold=0.1), ["unknown key 'gate_treshold'", "'gate_threshold'"]),
        (lambda v: v["base"].update(revison="main"), ["unknown key 'revison'", "'revision'"]),
        (lambda v: v["zoom"].update(gate_threshold=2), ["gate_threshold", "0 to 1"]),
        (lambda v: v.pop("base"), ["base is missing"]),
        (lambda v: v.pop("zoom"), ["zoom is missing"]),
        (lambda v: v["base"].update(hidden_size=128), ["hidden size 128", "64"]),
        (lambda v: v["base"].update(layers=9), ["number of layers 9", "7"]),
        (lambda v: v["base"].update(family="qwen2_5_vl"), ["family qwen2_5_vl", "qwen3_vl"]),
        (lambda v: v["base"].update(id="nobody/nothing-at-all"), ["base model", "nobody/nothing-at-all"]),
        (lambda v: v["zoom"].update(branch_layers=2), ["T=2", "has 3"]),
        (lambda v: v["zoom"].update(shared_layers=7), ["K=7", "7 layers"]),
        (lambda v: v.update(gate="yes"), ["gate", "true or false"]),
    ],
)
def test_bad_config_says_what_is_wrong(change, said, tmp_path):
    folder = save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter")
    change_config(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_engine(folder)
    for piece in said:
        assert piece in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_base_are_named(tmp_path):
    folder = save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter", base_id="owner/base")
    other = tiny_models.build_model("qwen3_vl", num_key_value_heads=4)
    backbone = tiny_models.build_backbone(other, tiny_models.tokenizer(), tiny_models.image_processor("qwen3_vl"))
    folders.write_plain(dataclasses.replace(folders.engine("qwen3_vl"), backbone=backbone), tmp_path / "base")
    change_config(folder, lambda v: v["base"].update(id="../base"))
    with refused("gate.layers.0.self_attn.k_proj.weight", "(32, 64)", "(64, 64)"):
        load_engine(folder)


def test_missing_branch_weights_are_said(tmp_path):
    folder = save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter")
    (folder / "qzoom.safetensors").unlink()
    with refused("no qzoom.safetensors"):
        load_engine(folder)


def test_folder_with_other_files_is_left_alone(tmp_path, merged):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for target, said in ((mine, "other files"), (mine / "thesis.txt", "is a file"), (merged["qwen3_vl"], "upstream")):
        with refused(said):
            save_pretrained(folders.engine("qwen3_vl"), target)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_interrupted_write_leaves_what_was_there(tmp_path):
    folder = save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def interrupted(folder: Path) -> None:
    with atomic_folder(folder, "adapter") as part:
        (part / "qzoom_config.json").write_text("{}")
        raise KeyboardInterrupt


def test_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("cannot be written"):
        save_pretrained(folders.engine("qwen3_vl"), tmp_path / "file" / "adapter")


def test_upload_without_network_is_one_sentence():
    with refused("owner/name", "HF_TOKEN"):
        push_to_hub(folders.engine("qwen3_vl"), "owner/name", base_id="owner/base")
    with refused("'not a name'"):
        push_to_hub(folders.engine("qwen3_vl"), "not a name", base_id="owner/base")


def change_config(folder: Path, change: Any) -> None:
    path = folder / "qzoom_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_head_that_is_no_longer_the_token_table_is_kept(family, tmp_path):
    model = tiny_models.build_model(family, tie_word_embeddings=True)
    base = tiny_models.build_backbone(model, tiny_models.tokenizer(), tiny_models.image_processor(family))
    made = tiny_models.build_engine(family, backbone=base)
    for changed in (False, True):
        if changed:
            model.lm_head.weight = torch.nn.Parameter(base.embedding.weight.flip(1), requires_grad=False)
        folder = save_pretrained(made, tmp_path / str(changed), include_base=True)
        config = json.loads((folder / "config.json").read_text())
        assert {config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]} == {not changed}
        loaded = load_engine(folder)
        assert torch.equal(loaded.backbone.model.lm_head.weight, model.lm_head.weight)
        assert torch.equal(loaded.backbone.embedding.weight, base.embedding.weight)


@pytest.mark.parametrize(
    ("part", "name", "options"),
    [
        ("region", "layers.0.mlp.up_proj.weight", {"base_id": "owner/base"}),
        ("gate", "head.weight", {"include_base": True}),
        ("base", "lm_head.weight", {"include_base": True}),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_no_numbers_are_not_written(tmp_path, part, name, options, value):
    made = folders.engine("qwen3_vl")
    module = made.backbone.model if part == "base" else getattr(made, part)
    weight = dict(module.named_parameters())[name]
    before = weight.detach().clone()
    named = name if part == "base" else f"{part}.{name}"
    try:
        weight.data.view(-1)[1] = value
        with refused(str(tmp_path / "adapter"), named, "not numbers (NaN or infinity)", "train them again"):
            save_pretrained(made, tmp_path / "adapter", **options)
    finally:
        weight.data.copy_(before)
    assert not list(tmp_path.iterdir())


def test_provenance_that_json_does_not_have_is_refused(tmp_path):
    made = folders.engine("qwen3_vl")
    made = dataclasses.replace(made, config=made.config.replace(provenance={"loss": float("nan")}))
    with pytest.raises(CheckpointError, match="provenance cannot be written as JSON"):
        save_pretrained(made, tmp_path / "adapter", include_base=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["x", "5", "0GB", "GB", "5 GB of it", "5.5.5GB", 0, -1])
def test_a_file_size_that_is_none(tmp_path, size):
    with pytest.raises(ConfigError, match=r"give a number of bytes, or a text such as '5GB'\.$"):
        save_pretrained(folders.engine("qwen3_vl"), tmp_path / "adapter", max_shard_size=size)
    assert not (tmp_path / "adapter").exists()
