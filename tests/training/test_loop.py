import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from qzoom.checkpoints.load import load_engine
from qzoom.engine.perceive import region_logits
from qzoom.engine.state import State, advance_region, advance_shared
from qzoom.errors import CheckpointError, ConfigError, DataError
from qzoom.images.load import load_image
from qzoom.labels.respond import prepare_image
from qzoom.training.loop import batch_of, learning_rate_at, steps_of
from qzoom.training.run import open_trackers
from qzoom.training.samples import SampleUse, conversation_ids, prompt_of, shown_picture
from qzoom.training.stages import StageRecipe, select
from qzoom.training.tasks import RegionMapTask
from qzoom.training.train_stage import prepare_engine, train_stage
from tests.training.runs import ROUNDING, recipe_of, run, same, weights_in, written


def test_the_region_branch_learns_where_to_look(world, tmp_path):
    recipe = recipe_of(world, steps=24, save_steps=24, cache_gb=0.1)
    report = run(recipe, tmp_path)
    assert report.last_loss < 0.5 * report.first_loss
    engine = load_engine(tmp_path / "model", dtype="float32")
    task = RegionMapTask(recipe, engine)
    for corner, sample in enumerate(task.samples[:4]):
        ids, _ = conversation_ids(task.chat, [("where?", "")])
        shown = shown_picture(engine, sample.question, view="dynamic", tokens=12, images="")
        prompt = prompt_of(engine, ids, [shown])
        with torch.no_grad():
            (state,) = advance_region(engine, advance_shared(engine, [State.empty(engine, prompt)]))
        values = region_logits(engine, state)[0]
        row, column = divmod(int(values.argmax()), values.shape[1])
        assert (row * 2 // values.shape[0], column * 2 // values.shape[1]) == divmod(corner, 2)
    config = json.loads((tmp_path / "model" / "qzoom_config.json").read_text())
    assert config["base"]["id"] == str(world / "base")
    assert config["zoom"]["provenance"]["regions"]["report"]["steps"] == 24
    assert not list((tmp_path / "model").glob("model*.safetensors"))


def test_the_gate_learns_when_to_look_closer(world, tmp_path):
    recipe = recipe_of(world, stage="gate", labels=(str(world / "gate"),), steps=24, save_steps=24, cache_gb=0.1)
    report = run(recipe, tmp_path)
    assert report.last_loss < 0.3 * report.first_loss


def test_parts_of_a_batch_do_not_change_the_result(world, tmp_path):
    for name, changes in {
        "ones": {"micro_batch": 1},
        "twos": {},
        "whole": {"micro_batch": 4},
        "recomputed": {"gradient_checkpointing": True},
        "kept": {"cache_gb": 0.1},
    }.items():
        run(recipe_of(world, steps=2, save_steps=2, **changes), tmp_path / name)
    losses = {}
    for name in ("ones", "twos", "whole", "recomputed", "kept"):
        losses[name] = [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
    for name in ("ones", "whole", "recomputed", "kept"):
        assert losses[name] == pytest.approx(losses["twos"], abs=1e-5)
        same(weights_in(tmp_path / name), weights_in(tmp_path / "twos"), ROUNDING)


class Killed(Exception):
    pass


@pytest.mark.parametrize("cache_gb", [0.0, 0.1])
def test_a_killed_run_ends_as_if_it_had_not_been(world, tmp_path, cache_gb):
    recipe = recipe_of(world, save_steps=2, steps=4, cache_gb=cache_gb, tokens=(8, 12))
    run(recipe, tmp_path / "straight")

    def die(facts):
        if facts.step == 3:
            raise Killed

    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", on_step=die)
    steps = []
    report = run(recipe, tmp_path / "killed", on_step=lambda facts: steps.append(facts.step))
    assert steps == [3, 4]  # step 2 was kept
    assert (report.start, report.steps) == (2, 4)
    straight = json.loads((tmp_path / "straight" / "report.json").read_text())
    assert (report.first_loss, report.last_loss) == (straight["first_loss"], straight["last_loss"])
    same(weights_in(tmp_path / "straight"), weights_in(tmp_path / "killed"))
    lines = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("straight", "killed")]
    assert [x["step"] for x in lines[1]] == [1, 2, 3, 4]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_loses_no_more_than_the_steps_since_the_checkpoint(world, tmp_path):
    recipe = recipe_of(world, steps=6)
    run(recipe, tmp_path / "straight")
    path = written(recipe, tmp_path / "recipe.yaml")
    words = [sys.executable, "-m", "tests.training.train_process", str(path), str(tmp_path / "killed")]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
    process.kill()
    said = 2 + len(process.stdout.read().split())
    process.wait()
    steps = []
    run(recipe, tmp_path / "killed", on_step=lambda facts: steps.append(facts.step))
    assert steps == list(range(steps[0], 7)) if steps else said == 6
    assert not steps or said < steps[0] <= said + 2  # a step may have been kept before it was said
    same(weights_in(tmp_path / "straight"), weights_in(tmp_path / "killed"))


def test_a_finished_run_does_nothing_more(world, tmp_path):
    run(recipe_of(world, steps=2), tmp_path)
    before = weights_in(tmp_path)
    report = run(recipe_of(world, steps=2), tmp_path)
    assert report.start == 2
    same(before, weights_in(tmp_path))


def test_resuming_with_other_settings_is_refused(world, tmp_path):
    run(recipe_of(world, steps=2), tmp_path)
    with pytest.raises(ConfigError, match=r"learning_rate was 0.003, is 0.001.*--fresh"):
        run(recipe_of(world, steps=2, learning_rate=1e-3), tmp_path)
    run(recipe_of(world, steps=2, micro_batch=1, save_steps=7), tmp_path)
    report = run(recipe_of(world, steps=2, learning_rate=1e-3), tmp_path, fresh=True)
    assert report.last_loss is not None
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        run(recipe_of(world, steps=2, learning_rate=1e-3), tmp_path)


def test_labels_of_another_model_or_stage_are_refused(world, tmp_path):
    engine = load_engine(world / "base", dtype="float32")
    with torch.no_grad():
        engine.backbone.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ConfigError, match="holds labels of 'model', not of the base model"):
        train_stage(recipe_of(world), tmp_path, base=engine)
    report = train_stage(recipe_of(world, steps=1, foreign_labels=True), tmp_path, base=engine)
    assert report.steps == 1
    with pytest.raises(ConfigError, match="holds records for 'gate', but this stage needs those for 'regions'"):
        run(recipe_of(world, labels=(str(world / "gate"),)), tmp_path / "other")


def test_bfloat16_stays_near_float32(world, tmp_path):
    wide = run(recipe_of(world, steps=1), tmp_path / "float32")
    report = run(recipe_of(world, steps=2, precision="bfloat16"), tmp_path / "bfloat16")
    assert report.first_loss == pytest.approx(wide.first_loss, rel=0.05)


def test_multi_turn_samples_share_a_sequence(world):
    engine = prepare_engine(load_engine(world / "base", dtype="float32"), recipe_of(world), "regions")
    together, apart = (RegionMapTask(recipe_of(world, multi_turn=flag), engine) for flag in (True, False))
    assert len(together.weights) == 8
    assert len(apart.weights) == 11  # four pictures have two turns, one of which is not usable
    assert sum(together.weights) == sum(apart.weights)
    assert together.identity != apart.identity


def test_batches_visit_every_sample_once_a_pass_and_the_rate_falls():
    recipe = StageRecipe(stage="regions", base="x", labels=("y",), batch=3)
    uses = [use for step in range(5) for use in batch_of(step, recipe, 5)]
    for epoch in range(3):
        assert sorted(d.index for d in uses if d.epoch == epoch) == list(range(5))
    assert [d.index for d in uses[:5]] != [d.index for d in uses[5:10]]
    assert steps_of(dataclasses.replace(recipe, epochs=2.0), 30) == 20
    assert steps_of(dataclasses.replace(recipe, steps=7), 30) == 7
    recipe = StageRecipe(stage="regions", base="x", labels=("y",), learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, 100, recipe) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 1e-3
    assert learning_rate_at(0, 1, recipe) == 1.0


def test_tensorboard_files_are_written(world, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe_of(world, steps=2, trackers=("tensorboard",)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_other_trackers_must_be_installed(world, tmp_path, monkeypatch):
    monkeypatch.setattr("qzoom.training.run.find_spec", lambda name: None)
    assert open_trackers(("tensorboard",), tmp_path, 0) == []
    with pytest.raises(ConfigError, match="The tracker wandb is not installed; install it with: pip install wandb"):
        open_trackers(("wandb",), tmp_path, 0)
    with pytest.raises(ConfigError, match="trackers"):
        recipe_of(world, trackers=("board",))


def test_what_cannot_run_is_refused_and_nothing_written(world, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError):
        train_stage(recipe_of(world, base=str(tmp_path / "none")), tmp_path / "run")
    with pytest.raises(DataError, match=r"records-00.jsonl is missing"):
        run(recipe_of(world, labels=(str(tmp_path / "nothing"),)), tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed is not supported; shard with FSDP"):
        run(recipe_of(world), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def beside(world, **changes):
    recipe = recipe_of(world, other_pictures=1.0, **changes)
    task = RegionMapTask(recipe, load_engine(recipe.base, dtype="float32"))
    return task, [task._beside(SampleUse(index, epoch)) for index in range(len(task.samples)) for epoch in range(20)]


def test_other_pictures_are_blank_or_ask_something_else(world):
    _, chosen = beside(world)
    assert {name for others in chosen for name in others.pictures} == {None}  # every picture is asked the same here
    assert {len(others.pictures) for others in chosen} >= {0, 1, 2}
    assert all(0 <= others.place <= len(others.pictures) for others in chosen)
    assert {others.share for others in chosen} == {True, False}
    task, again = beside(world)
    assert again == chosen
    task._asked[task.samples[-1].picture] = {"who?"}
    others = {name for use in range(200) for name in task._beside(SampleUse(0, use)).pictures}
    assert others == {None, len(task.samples) - 1}


@pytest.mark.parametrize("region_loss", ["bce", "focal"])
def test_with_other_pictures_parts_of_a_batch_do_not_change_the_gradients(world, region_loss):
    recipe = recipe_of(world, other_pictures=1.0, region_loss=region_loss)
    engine = load_engine(recipe.base, dtype="float32")
    weights = select(engine, "regions")
    task = RegionMapTask(recipe, engine)
    uses = [SampleUse(index, 0) for index in range(4)]
    assert len({len(task._beside(use).pictures) for use in uses}) > 1
    found = []
    for size in (1, 4):
        losses = [task.loss(engine, uses[i : i + size]) for i in range(0, 4, size)]
        total = torch.stack(losses).sum()
        found.append((total.item(), torch.autograd.grad(total, list(weights.values()), allow_unused=True)))
    (one, ones), (whole, wholes) = found
    assert one == pytest.approx(whole, rel=1e-5)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in ones)
    for name, first, second in zip(weights, ones, wholes, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
def test_a_question_among_several_pictures_finds_its_own(world, tmp_path):
    recipe = recipe_of(world, other_pictures=0.8, steps=60, save_steps=60, tokens=(12,), cache_gb=0.1)
    run(recipe, tmp_path)
    engine = load_engine(tmp_path / "model", dtype="float32")
    task = RegionMapTask(recipe, engine)
    ids, _ = conversation_ids(task.chat, [("where?", "")], 3)
    for corner, sample in enumerate(task.samples[:4]):
        own = shown_picture(engine, sample.question, view="dynamic", tokens=12, images="")
        blank = prepare_image(load_image(Image.new("RGB", own.size_px, "white")), "dynamic", 12)
        prompt = prompt_of(engine, ids, [blank, own, blank])
        with torch.no_grad():
            (state,) = advance_region(engine, advance_shared(engine, [State.empty(engine, prompt)]))
        maps = region_logits(engine, state)
        assert int(torch.stack([one.max() for one in maps]).argmax()) == 1
        row, column = divmod(int(maps[1].argmax()), maps[1].shape[1])
        assert (row * 2 // maps[1].shape[0], column * 2 // maps[1].shape[1]) == divmod(corner, 2)


def test_runs_from_before_a_setting_go_on_without_it(world):
    assert "other_pictures" not in recipe_of(world).decisive()
    assert recipe_of(world, other_pictures=0.5).decisive()["other_pictures"] == 0.5
