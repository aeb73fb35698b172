"""Labels and runs that a region branch decided belong to that branch and its settings."""

import dataclasses
import json
import shutil

import pytest
import torch

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.branches import region_digest, zoom_identity
from qzoom.checkpoints.load import load_engine
from qzoom.checkpoints.weights import base_digest
from qzoom.errors import ConfigError
from qzoom.training.loop import CHECKPOINT_FILE
from qzoom.training.run import read_tensors, save_tensors
from qzoom.training.train_stage import train_stage
from tests.tiny_models import build_engine
from tests.training.runs import recipe_of


def base_of(world):
    return load_engine(world / "base", dtype="float32")


def moved(engine):
    """The engine with another region branch."""
    with torch.no_grad():
        engine.region.layers[0].mlp.up_proj.weight.mul_(1.5)
    return engine


def adjusted(engine, **changes):
    return dataclasses.replace(engine, config=engine.config.replace(**changes))


def noting(folder, target, zoom):
    """A copy of a store whose header says which region branch and settings made it."""
    shutil.copytree(folder, target)
    header, *lines = (target / "records-00.jsonl").read_text().splitlines()
    values = json.loads(header)
    values["settings"]["settings"]["zoom"] = zoom
    (target / "records-00.jsonl").write_text("\n".join([json.dumps(values), *lines]) + "\n")
    return target


def test_the_digest_of_a_branch_sees_what_is_used_of_it_not_its_number_format(world, tmp_path):
    engine = base_of(world)
    first = region_digest(engine)
    assert len(first) == 16
    assert region_digest(load_engine(world / "base", dtype="bfloat16")) == first
    save_pretrained(engine, tmp_path / "adapter", base_id=str(world / "base"))
    assert region_digest(load_engine(tmp_path / "adapter")) == first
    made = build_engine("qwen3_vl")  # its last layer still has what never runs
    assert region_digest(made) == first
    with torch.no_grad():
        made.region.layers[-1].mlp.up_proj.weight.mul_(1.5)
    assert region_digest(made) == first
    assert region_digest(moved(engine)) != first
    assert base_digest(engine) == base_digest(base_of(world))
    assert region_digest(build_engine("qwen3_vl", heads=False)) == ""


def test_only_what_changes_answers_counts(world):
    engine = base_of(world)
    first = zoom_identity(engine)
    for changes in ({"gate_threshold": 0.7}, {"provenance": {"by": "hand"}}, {"decide_by": "map"}):
        assert zoom_identity(adjusted(engine, **changes)) == first
    box = dataclasses.replace(engine.config.box, margin_cells=1.0)
    for changes in ({"region_threshold": 0.33}, {"box": box}, {"positions": "aligned"}):
        assert zoom_identity(adjusted(engine, **changes)) != first


@pytest.mark.parametrize(("stage", "labels"), [("gate", "gate"), ("answers", "mined")])
def test_labels_of_another_branch_or_other_settings_are_refused(world, tmp_path, stage, labels):
    store = noting(world / labels, tmp_path / "labels", zoom_identity(base_of(world)))
    recipe = recipe_of(world, stage=stage, labels=(str(store),), steps=1, region_tokens=8, tokens=(12,))
    for engine, what in (
        (moved(base_of(world)), r"branch was '\w{16}', is '\w{16}'"),
        (adjusted(base_of(world), region_threshold=0.33), r"config.region_threshold was 0.6, is 0.33"),
    ):
        with pytest.raises(ConfigError, match=rf"labels holds labels of another region branch .*{what}"):
            train_stage(recipe, tmp_path / "run", base=engine)
        assert not (tmp_path / "run").exists()
    assert train_stage(recipe, tmp_path / "run", base=base_of(world)).steps == 1
    foreign = dataclasses.replace(recipe, foreign_labels=True)
    assert train_stage(foreign, tmp_path / "foreign", base=moved(base_of(world))).steps == 1
    older = dataclasses.replace(recipe, labels=(str(world / labels),))  # from before this was noted
    assert train_stage(older, tmp_path / "older", base=moved(base_of(world))).steps == 1


@pytest.mark.parametrize(("stage", "labels"), [("regions", "regions"), ("answers", "mined")])
def test_a_run_resumes_on_its_own_branch_only(world, tmp_path, stage, labels):
    recipe = recipe_of(world, stage=stage, labels=(str(world / labels),), steps=1, region_tokens=8, tokens=(12,))
    options = {"refit": stage == "regions"}
    train_stage(recipe, tmp_path, base=base_of(world), **options)
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(base_zoom.branch was '\w{16}', is"):
        train_stage(recipe, tmp_path, base=moved(base_of(world)), **options)
    assert train_stage(recipe, tmp_path, base=base_of(world), **options).start == 1
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT_FILE)
    run = json.loads(metadata["run"])
    assert run.pop("base_zoom") == zoom_identity(base_of(world))
    save_tensors(tmp_path / CHECKPOINT_FILE, tensors, metadata | {"run": json.dumps(run)})  # as older versions did
    assert train_stage(recipe, tmp_path, base=moved(base_of(world)), **options).start == 1


def test_the_first_stage_and_the_gate_do_not_depend_on_the_branch(world, tmp_path):
    for stage in ("regions", "gate"):
        recipe = recipe_of(world, stage=stage, labels=(str(world / stage),), steps=1)
        train_stage(recipe, tmp_path / stage, base=base_of(world))
        assert train_stage(recipe, tmp_path / stage, base=moved(base_of(world))).start == 1
