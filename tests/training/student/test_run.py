import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qzoom.checkpoints.load import load_engine
from qzoom.cli.main import run as command
from qzoom.data.overlay import ShareSchedule
from qzoom.errors import ConfigError, DataError
from qzoom.model import QZoom
from qzoom.training.lora import add_lora, finish_lora
from qzoom.training.student.recipe import SftSettings
from qzoom.training.student.run import prepare_student, train_student
from qzoom.training.student.schedule import RandomCrops
from tests.training.student.conftest import picture, recipe_of, row, write


def part(**changes) -> SftSettings:
    values = {"learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0, "batch": 4, "micro_batch": 2, "steps": 2}
    return SftSettings(**(values | changes))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def trained(student, data, tmp_path_factory):
    """Six steps, saved every two, validated every three."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(student, data, sft=part(steps=6), save_steps=2, validation_steps=3, fade=ShareSchedule(1.0, 0.0))
    return recipe, folder, train_student(recipe, folder)


def test_loss_falls_and_is_written_down(trained):
    _, folder, report = trained
    found = losses(folder)
    assert len(found) == 6
    assert found[-1] < 0.8 * found[0]
    assert (report.questions, report.negatives, report.held_out) == (24, 8, 4)
    assert [v.step for v in report.validations] == [0, 3, 6]
    assert {v.n_negative for v in report.validations} == {2}
    assert json.loads((folder / "report.json").read_text())["phases"][0]["steps"] == 6


def test_result_loads_with_its_heads_unchanged(trained, student):
    _, folder, _ = trained
    made, before = QZoom.from_pretrained(folder / "model"), QZoom.from_pretrained(student)
    assert made.has_gate
    assert made.has_region
    for name in ("gate", "region"):
        old, new = (getattr(m.engine, name).state_dict() for m in (before, made))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old)
    facts = made.config.provenance["distill"]
    assert {part: note.split(":")[0] for part, note in facts["stale"].items()} == dict.fromkeys(
        ("gate", "region"), "Fitted on the model before this training; fit it again"
    )
    assert facts["recipe"]["sft"]["steps"] == 6
    old, new = load_engine(student).backbone.model.state_dict(), made.engine.backbone.model.state_dict()
    assert not torch.equal(old["model.visual.patch_embed.proj.weight"], new["model.visual.patch_embed.proj.weight"])


def test_batches_prepared_ahead_are_the_same_ones(student, data, tmp_path):
    crops = RandomCrops(ShareSchedule(0.5, 0.5, "constant"), (4, 9), 1.0)
    recipe = recipe_of(student, data, sft=part(steps=2), random_crops=crops)
    train_student(recipe, tmp_path / "here")
    train_student(dataclasses.replace(recipe, loaders=2), tmp_path / "ahead")
    assert losses(tmp_path / "ahead") == losses(tmp_path / "here")
    here, ahead = weights(tmp_path / "here"), weights(tmp_path / "ahead")
    assert all(torch.equal(here[name], ahead[name]) for name in here)


def test_a_stopped_run_ends_as_an_undisturbed_one(trained, tmp_path):
    recipe, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    stopped = tmp_path / "run"
    for name in ("checkpoint-6",):
        shutil.rmtree(stopped / "sft" / name)
    (stopped / "sft" / "final.safetensors").unlink()
    (stopped / "sft" / "best-sft.safetensors").unlink()
    shutil.rmtree(stopped / "model")
    (stopped / "sft" / "checkpoint-5").mkdir()
    assert (stopped / "sft" / "checkpoint-4").is_dir()
    train_student(dataclasses.replace(recipe, loaders=1), stopped)
    assert losses(stopped)[:4] == losses(folder)[:4]
    assert losses(stopped) == losses(folder)
    reports = [json.loads((path / "report.json").read_text())["phases"][0] for path in (folder, stopped)]
    assert [report["start"] for report in reports] == [0, 4]
    assert len({(report["first_loss"], report["last_loss"]) for report in reports}) == 1
    last = torch.load(folder / "sft" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    again = torch.load(stopped / "sft" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert all(torch.equal(last["state"][k]["exp_avg"], again["state"][k]["exp_avg"]) for k in last["state"])
    one, two = (load_file(f / "sft" / "checkpoint-6" / "model.safetensors") for f in (folder, stopped))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_muon_learns_and_goes_on_exactly(student, data, tmp_path):
    recipe = recipe_of(student, data, sft=part(optimizer="muon", steps=4), save_steps=2)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_student(recipe, whole)
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "sft" / "checkpoint-4")
    shutil.rmtree(stopped / "model")
    for path in stopped.glob("sft/*.safetensors"):
        path.unlink()
    train_student(recipe, stopped)
    assert losses(stopped) == losses(whole)
    old, new = weights(whole), weights(stopped)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_finished_run_is_left_alone_and_another_refused(trained, tmp_path):
    recipe, folder, _ = trained
    before = weights(folder)
    report = train_student(recipe, folder)
    assert report.phases[0].start == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder).items())
    with pytest.raises(ConfigError, match="seed"):
        train_student(recipe_of(recipe.base, recipe.data, sft=recipe.sft, seed=1), folder)


def test_best_weights_are_kept(student, tmp_path):
    """A learning rate that wrecks the student leaves it as it was."""
    own = [row(n, "colour", answer=answer) for n, answer in enumerate(answers_of(student, range(4)))]
    folder = write(tmp_path / "data", [row(n, "absent") for n in range(4, 8)])
    write(folder, own, "validation")
    recipe = recipe_of(student, folder, tokens=(), sft=part(learning_rate=0.5, steps=1), validation_steps=1)
    report = train_student(recipe, tmp_path / "run")
    assert report.validations[0].exact == 1.0
    assert report.validations[-1].exact < 1.0
    assert report.phases[0].best_step == 0
    old = load_engine(student).backbone.model.state_dict()
    assert all(torch.equal(old[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    last = train_student(dataclasses.replace(recipe, keep="last"), tmp_path / "last")
    assert last.phases[0].best_step == last.phases[0].steps == report.validations[-1].step
    assert not all(torch.equal(old[name], tensor) for name, tensor in weights(tmp_path / "last").items())


def answers_of(student, numbers):
    model = QZoom.from_pretrained(student)
    asked = [(picture(n), "What colour?") for n in numbers]
    found = [a.text for a in model.ask_batch(asked, zoom="never", max_new_tokens=4)]
    assert all(text.strip() for text in found)
    return found


def test_lora_is_merged(student, data, tmp_path):
    recipe = recipe_of(student, data, lora_rank=2, sft=part(learning_rate=0.02))
    report = train_student(recipe, tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    old, new = load_engine(student).backbone.model.state_dict(), weights(tmp_path)
    changed = {name for name, tensor in new.items() if not torch.equal(old[name], tensor)}
    if report.phases[0].best_step:
        assert any("visual" in name for name in changed)
        assert any("language_model" in name for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)
    assert "lora" not in " ".join(new)
    QZoom.from_pretrained(tmp_path / "model")


def test_lora_weights_of_the_base_become_part_of_the_student(student, data, tmp_path):
    engine = load_engine(student)
    wrapped = add_lora(engine, 2)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    base = finish_lora(engine, wrapped)
    train_student(recipe_of(student, data), tmp_path, base=base)
    made = load_engine(tmp_path / "model", dtype="float32")
    assert base.lora is not None
    assert made.lora is None
    trained = base.backbone.model.state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in made.backbone.model.state_dict().items())


def test_what_trains_and_missing_data(student, tmp_path):
    engine = load_engine(student)
    _, every = prepare_student(engine, recipe_of(student, student))
    assert any("visual" in name for name in every)
    _, some = prepare_student(load_engine(student), recipe_of(student, student, vision=False))
    assert not any("visual" in name for name in some)
    assert engine.gate is not None
    assert not any(weight.requires_grad for weight in engine.gate.parameters())
    with pytest.raises(DataError, match="is no folder"):
        train_student(recipe_of(student, tmp_path / "none"), tmp_path / "run")
    with pytest.raises(DataError, match="no Parquet file"):
        train_student(recipe_of(student, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rehearsal_and_no_validation(student, tmp_path):
    folder = write(tmp_path / "data", [row(n, "colour") for n in range(4)])
    recipe = recipe_of(student, folder, rehearsal=0.5, validation=0.0, sft=part(steps=2))
    report = train_student(recipe, tmp_path / "run")
    assert (report.phases[0].steps, report.phases[0].best_step, report.validations) == (2, None, ())
    assert len(losses(tmp_path / "run")) == 2


ROOT = Path(__file__).parents[3]
RECIPE = {
    "method": "sft", "tokens": [12], "precision": "float32", "gradient_checkpointing": False, "validation_steps": 100,
    "max_new_tokens": 4, "trackers": [],
    "sft": {"learning_rate": 0.003, "warmup": 0.0, "batch": 4, "micro_batch": 2, "steps": 2},
}  # fmt: skip


def words(student, data, folder) -> list[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(RECIPE | {"base": str(student)}))
    return ["train", "student", str(path), "--data", str(data), "-o", str(folder), "--device", "cpu", "--json"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_take_the_steps_of_one(student, data, tmp_path, capsys):
    assert command(words(student, data, tmp_path / "one")) == 0
    alone = json.loads(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qzoom"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    together = words(student, data, tmp_path / "two")
    done = subprocess.run(
        launch + together, capture_output=True, text=True, env=env, cwd=ROOT, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for found in (alone, shared):
        assert (found["questions"], found["negatives"], found["held_out"]) == (24, 8, 4)
        assert (Path(found["model"]) / "qzoom.safetensors").is_file()
