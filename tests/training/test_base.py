"""The base trainer: it learns, stops and goes on exactly, exports what transformers loads, and refuses bad recipes."""

import dataclasses
import json

import pytest
import torch

from qzoom.data.synthetic.texts import vocabulary_sentences
from qzoom.errors import ConfigError
from qzoom.training.base import train_base
from qzoom.training.draws import Draws
from qzoom.training.recipe import BaseRecipe, Stage, load_recipe
from qzoom.training.tokenizer import build_tokenizer
from tests.training.test_batch import SMALL


def _recipe(steps, **changes):
    values = {
        "stages": (Stage("read", steps, {"tags": 1.0}),),
        "processes": 1,
        "micro_batches": 1,
        "pointing_layer": 1,
        "pointing_heads": (0, 1),
        "vocabulary_size": 400,
        "bf16": False,
        "evaluate_every": 50,
        "evaluate_batches": 1,
        "architecture": SMALL,
    }
    return BaseRecipe(**{**values, **changes})


def test_a_stopped_run_goes_on_exactly(tmp_path):
    stage = Stage("read", 4, {"tags": 1.0, "glyphs": 0.2})
    whole = train_base(_recipe(4, stages=(stage,)), tmp_path / "whole")
    train_base(_recipe(2, stages=(dataclasses.replace(stage, steps=2),)), tmp_path / "parts")
    parts = train_base(_recipe(4, stages=(stage,)), tmp_path / "parts")
    first = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["guided"]
    second = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["guided"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_pictures_drawn_ahead_are_the_same_ones(tmp_path):
    stage = Stage("read", 3, {"tags": 1.0, "glyphs": 0.5})
    here = train_base(_recipe(3, stages=(stage,), gather=2), tmp_path / "here")
    ahead = train_base(_recipe(3, stages=(stage,), gather=2, loaders=2), tmp_path / "ahead")
    assert (here / "model.safetensors").read_bytes() == (ahead / "model.safetensors").read_bytes()


def test_a_gathered_batch_holds_what_several_processes_draw():
    recipe = _recipe(2, stages=(Stage("read", 2, {"line": 1.0, "tags": 1.0}),))
    tokenizer = build_tokenizer(vocabulary_sentences(), recipe.vocabulary_size)
    task, both = Draws(dataclasses.replace(recipe, gather=2), tokenizer, None, 0)[1]
    apart = [Draws(recipe, tokenizer, None, rank)[1] for rank in (0, 1)]
    assert [name for name, _ in apart] == [task, task]
    assert both.tasks == apart[0][1].tasks + apart[1][1].tasks
    assert torch.equal(both.pixels, torch.cat([batch.pixels for _, batch in apart]))
    assert not torch.equal(apart[0][1].pixels, apart[1][1].pixels)


def test_export_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    folder = train_base(_recipe(1), tmp_path)
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id
    assert json.loads((folder / "preprocessor_config.json").read_text())["patch_size"] == 16


def test_a_run_starts_from_exported_weights(tmp_path):
    first = train_base(_recipe(1), tmp_path / "first")
    # Learning rates of zero show what it started from: the exported weights, and no others.
    again = train_base(_recipe(1, start_from=str(first), seed=5, muon_lr=0.0, adamw_lr=0.0), tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        train_base(_recipe(1, start_from=str(tmp_path)), tmp_path / "third")
    with pytest.raises(ConfigError, match="another architecture"):
        train_base(_recipe(1, start_from=str(first), vocabulary_size=401), tmp_path / "fourth")


def test_guides_spare_the_tower_at_first(tmp_path):
    tower = _tower(train_base(_recipe(1), tmp_path / "first"))
    learned = {"stages": (Stage("read", 1, {"glyphs": 1.0}),), "start_from": str(tmp_path / "first" / "model")}
    spared = _tower(train_base(_recipe(1, **learned, guide_steps=1, weight_decay=0.0), tmp_path / "spared"))
    taught = _tower(train_base(_recipe(1, **learned, guide_steps=0, weight_decay=0.0), tmp_path / "taught"))
    assert torch.equal(tower, spared)
    assert not torch.equal(tower, taught)


def _tower(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")["model.visual.patch_embed.proj.weight"]


def test_the_curve_has_held_out_figures(tmp_path):
    train_base(_recipe(2), tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "training_curve.jsonl").read_text().splitlines()]
    held_out = [entry["held_out"] for entry in entries if "held_out" in entry]
    assert len(held_out) == 1
    assert 0.0 <= held_out[0]["tags"] <= 1.0


@pytest.mark.parametrize("name", ["base", "receipts", "continue", "read", "read-twin", "teacher", "teacher-twin"])
def test_a_shipped_recipe_loads(name):
    recipe = load_recipe(f"recipes/tiny/{name}.yaml")
    assert recipe.steps >= 350
    assert recipe.at(0)[0].name == recipe.stages[0].name
    assert recipe.at(recipe.steps)[0].name == recipe.stages[-1].name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [{name: a, steps: 1, mix: {line: 1}}]\nmuonlr: 1", "did you mean `muon_lr`"),
        ("stages: [{name: a, steps: 1, mix: {lines: 1}}]", "did you mean `line`"),
        ("stages: [{name: a, stepz: 1, mix: {line: 1}}]", "did you mean `steps`"),
        ("stages: [{name: a, steps: 0, mix: {line: 1}}]", "at least one step"),
        ("stages: []", "non-empty list"),
        ("- 1", "mapping"),
        ("stages: [", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_learning_rate_follows_the_stage():
    recipe = _recipe(10, stages=(Stage("a", 10, {"line": 1.0}), Stage("b", 10, {"line": 1.0}, 1.0, 0.0)))
    assert recipe.at(5) == (recipe.stages[0], 1.0)
    assert recipe.at(15)[1] == pytest.approx(0.5)
