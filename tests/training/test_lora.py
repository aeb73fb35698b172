import dataclasses
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.lora import add_to_backbone
from qzoom.checkpoints.weights import base_digest
from qzoom.cli.main import run as command
from qzoom.errors import CheckpointError, ConfigError
from qzoom.model import QZoom
from qzoom.settings import to_dict
from qzoom.training.stages import StageRecipe
from qzoom.training.train_stage import train_stage
from tests.tiny_models import build_engine, picture
from tests.training.conftest import region_store

pytest.importorskip("peft")


def recipe_of(stage, base, labels, **changes):
    values = {
        "stage": stage,
        "base": str(base),
        "labels": (str(labels),),
        "tokens": (12,),
        "region_tokens": 8,
        "batch": 2,
        "micro_batch": 2,
        "steps": 6,
        "learning_rate": 1e-2,
        "precision": "float32",
        "gradient_checkpointing": False,
        "trackers": (),
    }
    return StageRecipe(**values | changes)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The run's folder, and the engine as training left it."""
    folder = tmp_path_factory.mktemp("lora")
    engine = load_engine(world / "base", dtype="float32")
    train_stage(recipe_of("answers", world / "base", world / "mined", lora_rank=2), folder, base=engine)
    return folder, engine


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("stage", "labels", "more"),
    [("answers", "mined", {"lora_rank": 2, "gradient_checkpointing": True}), ("gate", "gate", {})],
)
def test_few_samples_are_said_and_nothing_of_the_libraries(world, tmp_path, capsys, stage, labels, more):
    recipe = recipe_of(stage, world / "base", world / labels, steps=1, **more)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
    words = ["train", stage, "--recipe", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run"), "--device", "cpu"]
    assert command(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training 1 of 1")]
    assert len(lines) == 1
    assert re.fullmatch(
        r"warning: trained on \d+ samples; so few say nothing about the method\. Label more\.", lines[0]
    )


def weights(engine):
    return engine.backbone.model.state_dict()


def assert_same(one, two, tolerance=0.0):
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


def tokens_of(engine):
    said = QZoom(engine).ask_batch([(picture(i), "where?") for i in range(3)], zoom="always", max_new_tokens=6)
    return [answer.tokens for answer in said]


def test_the_adapter_holds_the_matrices_and_not_the_base(world, trained):
    folder = trained[0] / "model"
    assert not list(folder.glob("model*.safetensors"))
    assert {path.name for path in (folder / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    assert (
        sum(tensor.numel() for tensor in tensors.values())
        == json.loads((trained[0] / "report.json").read_text())["trained"]
    )
    settings = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    assert settings["base_model_name_or_path"] == str(world / "base")
    config = json.loads((folder / "qzoom_config.json").read_text())
    assert config["base"]["id"] == str(world / "base")
    assert (config["format_version"], len(config["lora_base_weights"])) == (2, 16)
    assert json.loads((world / "base" / "qzoom_config.json").read_text())["format_version"] == 1


def test_loaded_it_is_the_model_that_was_trained(world, trained):
    folder, engine = trained
    loaded = load_engine(folder / "model")
    assert_same(weights(loaded), weights(engine))
    before = weights(load_engine(world / "base"))
    moved = {name for name, value in weights(loaded).items() if not value.equal(before[name])}
    assert moved
    assert all(".layers." in name and name.endswith("_proj.weight") for name in moved)
    assert tokens_of(loaded) == tokens_of(engine)
    assert loaded.gate is not None


def test_peft_reads_the_same_from_the_same_folder(world, trained):
    from peft import PeftModel

    base = load_engine(world / "base", dtype="float32")
    wrapped = PeftModel.from_pretrained(base.backbone.model, trained[0] / "model" / "lora")
    loaded = load_engine(trained[0] / "model", dtype="float32")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        theirs, ours = wrapped(input_ids=ids).logits, loaded.backbone.model(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    wrapped.merge_and_unload()
    assert_same(weights(base), weights(loaded), 1e-6)
    made = dataclasses.replace(loaded, backbone=base.backbone)
    assert tokens_of(made) == tokens_of(loaded)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_convert_makes_one_model_of_it(worlds, tmp_path, family, capsys):
    world = worlds[family]
    train_stage(
        recipe_of("answers", world / "base", world / "mined", lora_rank=2, steps=2),
        tmp_path / "run",
        base=load_engine(world / "base", dtype="float32"),
    )
    loaded = load_engine(tmp_path / "run" / "model")
    assert command(["convert", str(tmp_path / "run" / "model"), str(tmp_path / "merged")]) == 0
    assert "LoRA weights were added to" in capsys.readouterr().err
    merged = load_engine(tmp_path / "merged")
    assert_same(weights(merged), weights(loaded))
    assert merged.lora is None
    assert tokens_of(merged) == tokens_of(loaded)
    convert(tmp_path / "run" / "model", tmp_path / "plain", answer_only=True)
    plain = load_engine(tmp_path / "plain")
    assert plain.region is None
    assert_same(weights(plain), weights(loaded))


def test_another_base_is_refused(trained, tmp_path):
    other = build_engine("qwen3_vl", seed=7)
    save_pretrained(other, tmp_path / "other", include_base=True)
    adapter = shutil.copytree(trained[0] / "model", tmp_path / "adapter")
    config = json.loads((adapter / "qzoom_config.json").read_text())
    config["base"]["id"] = str(tmp_path / "other")
    (adapter / "qzoom_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"trained on another base \(weights \w{16}, not \w{16}\)"):
        load_engine(adapter)
    with pytest.raises(CheckpointError, match="trained on another base"):
        convert(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_number_formats_agree_on_what_the_labels_belong_to(world, trained):
    wide, narrow = (load_engine(trained[0] / "model", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.backbone.dtype == torch.bfloat16
    assert base_digest(wide) == base_digest(narrow) != base_digest(load_engine(world / "base"))
    with torch.no_grad():
        lora = wide.lora
        next(iter(lora.tensors.values())).add_(0.01)
    assert base_digest(wide) != base_digest(narrow)
    half = load_engine(world / "base").backbone
    half.model.half()
    with pytest.raises(CheckpointError, match="float32 or bfloat16 only"):
        add_to_backbone(half, lora, "it")


def test_later_stages_go_on_from_it_and_carry_it_on(world, trained, tmp_path):
    base = trained[0] / "model"
    labels = region_store(tmp_path / "labels", world / "pictures", base_digest(load_engine(base)))
    recipe = recipe_of("regions", base, labels, steps=2)
    train_stage(recipe, tmp_path / "refit", refit=True)
    made, before = load_engine(tmp_path / "refit" / "model"), load_engine(base)
    assert_same(weights(made), weights(before))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "refit" / "model" / "lora" / name).read_bytes() == (base / "lora" / name).read_bytes()
    one, two = made.region.state_dict(), before.region.state_dict()
    assert any(not one[name].equal(two[name]) for name in one)
    assert_same(made.gate.state_dict(), before.gate.state_dict())
    with pytest.raises(ConfigError, match="holds labels of 'model', not of the base model"):
        train_stage(recipe_of("regions", world / "base", labels, steps=2), tmp_path / "wrong", refit=True)
    again = recipe_of("answers", base, world / "mined", lora_rank=2, foreign_labels=True)
    with pytest.raises(ConfigError, match="has LoRA weights already"):
        train_stage(again, tmp_path / "again")


def test_training_all_weights_on_top_makes_a_whole_model(world, trained, tmp_path):
    recipe = recipe_of("answers", trained[0] / "model", world / "mined", steps=1, foreign_labels=True)
    train_stage(recipe, tmp_path)
    assert not (tmp_path / "model" / "lora").exists()
    assert load_engine(tmp_path / "model").lora is None


def test_a_folder_never_keeps_the_matrices_of_an_earlier_adapter(world, trained, tmp_path):
    loaded = load_engine(trained[0] / "model")
    save_pretrained(loaded, tmp_path / "out", base_id=str(world / "base"))
    assert_same(weights(load_engine(tmp_path / "out")), weights(loaded))
    save_pretrained(loaded, tmp_path / "out", include_base=True)
    assert not (tmp_path / "out" / "lora").exists()
    assert_same(weights(load_engine(tmp_path / "out")), weights(loaded))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("adapter_config.json", {"use_dora": True}, "use_dora=True, which qzoom cannot add"),
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type='IA3'"),
        ("adapter_config.json", {"r": 3}, "do not fit"),
        ("adapter_config.json", {"r": "2"}, "must be numbers"),
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_model.safetensors", None, "cannot be read"),
        ("adapter_model.safetensors", b"nonsense", "cannot be read"),
    ],
)
def test_damaged_or_foreign_matrices_are_refused(trained, tmp_path, file, change, said):
    adapter = shutil.copytree(trained[0] / "model", tmp_path / "adapter")
    path = adapter / "lora" / file
    if isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    with pytest.raises(CheckpointError, match=said):
        load_engine(adapter)
