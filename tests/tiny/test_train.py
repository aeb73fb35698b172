import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qzoom.errors import CheckpointError, ConfigError
from qzoom.settings import from_mapping, to_dict
from tests.tiny.test_batch import SMALL
from tiny.processes import split_evenly
from tiny.recipe import Recipe, load_recipe
from tiny.train import Run

ROOT = Path(__file__).resolve().parents[2]
STATE = "state.safetensors"


def _recipe(packs, minutes, **changes):
    values = {
        "stages": [{"name": "read", "minutes": minutes, "mix": {"sheet_line": 1.0, "sheet_lines_seen": 1.0}}],
        "packs": str(packs), "pack_counts": {"sheets": 3, "documents": 2, "scenes": 1, "held_out": 2},
        "pointing_layer": 1, "pointing_heads": (0, 1), "vocabulary_size": 400, "step_positions": 300,
        "architecture": to_dict(SMALL), "evaluate": ["sheet_line"], "evaluate_examples": 4,
    }  # fmt: skip
    return from_mapping(Recipe, {**values, **changes}, "test")


def take_steps(recipe, folder, count):
    folder.mkdir(exist_ok=True)
    run = Run(recipe, folder)
    for _ in range(count):
        run._train_step()
        run.counters["step"] += 1
    run._save()
    return run


def _weights(folder):
    return {name: tensor for name, tensor in load_file(folder / STATE).items() if name.startswith("weight/")}


def test_a_stopped_run_goes_on_exactly(tmp_path, packs):
    recipe = _recipe(packs, 1)
    take_steps(recipe, tmp_path / "whole", 3)
    take_steps(recipe, tmp_path / "parts", 1)
    take_steps(recipe, tmp_path / "parts", 2)
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_curve_of_a_killed_run_is_cut_to_its_state(tmp_path, packs):
    recipe = _recipe(packs, 1)
    run = take_steps(recipe, tmp_path / "run", 2)
    for step in (1, 2, 3, 4):
        run.counters["step"] = step
        run._log("train", {"answer": 1.0})
    curve = tmp_path / "run" / "training_curve.jsonl"
    curve.write_text(curve.read_text() + '{"step": 5, "tra')
    before = curve.read_text()
    Run(recipe, tmp_path / "run")
    assert curve.read_text() == before
    Run(_recipe(packs, 0.0001), tmp_path / "run").loop()
    assert [json.loads(line)["step"] for line in curve.read_text().splitlines()] == [1, 2, 3]


def test_the_loss_falls(tmp_path, packs):
    run = take_steps(_recipe(packs, 1, bf16=False, warmup_steps=5, step_positions=600), tmp_path / "run", 40)
    losses = run._window["answer"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_state_of_other_sizes_is_refused(tmp_path, packs):
    take_steps(_recipe(packs, 1), tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match="other sizes"):
        Run(_recipe(packs, 1, vocabulary_size=401), tmp_path / "run")


def test_export_loads_in_transformers_and_starts_another_run(tmp_path, packs):
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    recipe = _recipe(packs, 0.001)
    output = tmp_path / "first"
    output.mkdir()
    Run(recipe, output).loop()
    folder = output / "model"
    model, report = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id
    again = Run(_recipe(packs, 1, start_from=str(folder), seed=9), tmp_path)
    again.export(tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        Run(_recipe(packs, 1, start_from=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match="another architecture"):
        Run(_recipe(packs, 1, start_from=str(folder), vocabulary_size=401), tmp_path)
    entries = [json.loads(line) for line in (output / "training_curve.jsonl").read_text().splitlines()]
    assert 0.0 <= entries[-1]["held_out"]["sheet_line"] <= 1.0


def _step(state):
    with safe_open(state, "pt") as file:
        return json.loads(file.metadata()["state"])["counters"]["step"]


@pytest.mark.slow
def test_kill_9_while_training(tmp_path, packs):
    recipe = _recipe(packs, 30, checkpoint_minutes=0.0005, evaluate=())
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(to_dict(recipe)))
    command = [sys.executable, str(ROOT / "tiny" / "train.py"), "train", "--recipe", str(path), "-o"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    process = subprocess.Popen([*command, str(tmp_path / "run")], env=environment)
    state = tmp_path / "run" / STATE
    while not state.is_file() or _step(state) == 0:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = Run(recipe, tmp_path / "run")
    assert run.counters["step"] >= 1
    run._train_step()


def test_the_decoder_may_stand_still(tmp_path, packs):
    stages = [{"name": "read", "minutes": 1, "mix": {"sheet_line": 1.0}, "decoder_lr": 0.0}]
    take_steps(_recipe(packs, 1, stages=stages), tmp_path / "run", 0)
    before = _weights(tmp_path / "run")
    take_steps(_recipe(packs, 1, stages=stages), tmp_path / "run", 1)
    changed = {name for name, weight in _weights(tmp_path / "run").items() if not torch.equal(weight, before[name])}
    assert any("visual" in name for name in changed)
    assert not any("language_model" in name for name in changed)


def test_guides_spare_the_tower_at_first(tmp_path, packs):
    stages = [{"name": "read", "minutes": 1, "mix": {"sheet_lines_seen": 1.0}}]
    first = take_steps(_recipe(packs, 1), tmp_path / "first", 1)
    first.export(tmp_path / "model")
    settings = {"stages": stages, "start_from": str(tmp_path / "model"), "weight_decay": 0.0, "bf16": False}
    name = "weight/model.model.visual.patch_embed.proj.weight"
    start = load_file(tmp_path / "model" / "model.safetensors")["model.visual.patch_embed.proj.weight"].float()
    take_steps(_recipe(packs, 1, **settings, guide_steps=1), tmp_path / "spared", 1)
    take_steps(_recipe(packs, 1, **settings, guide_steps=0), tmp_path / "taught", 1)
    assert torch.equal(start, _weights(tmp_path / "spared")[name])
    assert not torch.equal(start, _weights(tmp_path / "taught")[name])


@pytest.mark.parametrize(
    "name",
    [
        "reader",
        "reader-proposals",
        "reader-exchanged",
        "reader-mean",
        "reader-respelled",
        "size-5",
        "size-8",
        "size-10",
    ],
)
def test_a_shipped_recipe_loads(name):
    recipe = load_recipe(ROOT / "recipes" / "tiny" / f"{name}.yaml")
    assert recipe.minutes > 0
    assert recipe.at(0)[0].name == recipe.stages[0].name
    assert recipe.at(recipe.minutes)[0].name == recipe.stages[-1].name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: [{name: a, minutes: 1, mix: {real_line: 1}}]\nmuonlr: 1", "did you mean 'muon_lr'"),
        ("stages: [{name: a, minutes: 1, mix: {lines: 1}}]", "unknown exercise `lines`"),
        ("stages: [{name: a, minutes: 0, mix: {real_line: 1}}]", r"stages\[0\]\.minutes must be a number above 0"),
        ("stages: []", "stages"),
        ("stages: [", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_learning_rate_follows_the_stage(packs):
    mix = {"sheet_line": 1.0}
    stages = [
        {"name": "a", "minutes": 10, "mix": mix},
        {"name": "b", "minutes": 10, "mix": mix, "lr_start": 1.0, "lr_end": 0.0},
    ]
    recipe = _recipe(packs, 1, stages=stages)
    assert recipe.at(5) == (recipe.stages[0], 1.0)
    assert recipe.at(15)[1] == pytest.approx(0.5)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, packs):
    """The same examples are shared out, so that the weights are those of one process, rounding aside."""
    recipe = _recipe(packs, 30, bf16=False, batch_positions=300, step_positions=1200)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(to_dict(recipe)))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(path), str(tmp_path / "two"), "2", "2"]  # the last two steps go on from the state of the first two
    subprocess.run([*launch, str(ROOT / "tests" / "tiny" / "steps_process.py"), *words], env=environment, check=True)
    take_steps(recipe, tmp_path / "start", 0)
    one = take_steps(recipe, tmp_path / "one", 4)
    assert Run(recipe, tmp_path / "two").counters["samples"] == one.counters["samples"]
    start, single, shared = (_weights(tmp_path / name) for name in ("start", "one", "two"))
    moved = torch.cat([(single[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(single[name] - shared[name]).flatten() for name in start])
    assert moved.norm() > 0
    assert apart.norm() < 0.01 * moved.norm()


def test_shares_are_about_as_large():
    costs = [5, 1, 4, 2, 3, 3]
    shares = split_evenly(range(6), costs, 2)
    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert [sum(costs[i] for i in share) for share in shares] == [9, 9]
    assert split_evenly(["a"], [1.0], 2) == [["a"], []]
