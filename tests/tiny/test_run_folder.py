"""What a training finds in its folder: an earlier run, another process, damaged files, a full disk."""

import contextlib
import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qzoom.errors import CheckpointError, ConfigError
from qzoom.settings import to_dict
from tests.tiny.test_train import STATE, _recipe, take_steps
from tiny.run_folder import append_to_curve, cut_curve, training_in
from tiny.train import Run, app, make_packs

CURVE = "training_curve.jsonl"


def _call(command, recipe, folder, *options):
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(to_dict(recipe)))
    return CliRunner().invoke(app, [command, "--recipe", str(path), "-o", str(folder), *options])


def _steps(folder):
    return [json.loads(line)["step"] for line in (folder / CURVE).read_text().splitlines()]


@contextlib.contextmanager
def _files_of_at_most(size):
    """A disk on which larger files cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 3}, "seed was 0, is 3"),
        ({"muon_lr": 0.001, "clip_norm": 2.0}, r"muon_lr was 0\.008, is 0\.001; clip_norm was 1\.0, is 2\.0"),
        ({"matching_weight": 0.5}, r"matching_weight was 0\.0, is 0\.5"),
    ],
)
def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path, packs, changes, words):
    take_steps(_recipe(packs, 1), tmp_path / "run", 1)
    state = (tmp_path / "run" / STATE).read_bytes()
    with pytest.raises(ConfigError, match=words):
        Run(_recipe(packs, 1, **changes), tmp_path / "run").loop()
    assert (tmp_path / "run" / STATE).read_bytes() == state


def test_other_weights_to_start_from_and_other_pages_are_noticed(tmp_path, packs):
    first = take_steps(_recipe(packs, 1), tmp_path / "first", 0)
    first.export(tmp_path / "model")
    take_steps(_recipe(packs, 1, start_from=str(tmp_path / "model")), tmp_path / "run", 1)
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = _recipe(packs, 0.0001, start_from=str(tmp_path / "moved"))
    Run(moved, tmp_path / "run").loop()
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "moved" / "model.safetensors")
    with pytest.raises(ConfigError, match="start_from was"):
        Run(moved, tmp_path / "run").loop()
    run = Run(_recipe(packs, 1), tmp_path / "first")
    run._settings_there["packs"]["sheets_train"]["renderer"] = "0-other"
    with pytest.raises(ConfigError, match=r"packs\.sheets_train\.renderer was '0-other'"):
        run.loop()


def test_a_longer_recipe_with_other_stages_goes_on(tmp_path, packs):
    take_steps(_recipe(packs, 1), tmp_path / "run", 2)
    stages = [{"name": "more", "minutes": 0.0001, "mix": {"sheet_line": 0.5, "document_page": 0.5}}]
    recipe = _recipe(packs, 1, stages=stages, evaluate=("document_page",), bf16=False)
    make_packs(recipe)
    run = Run(recipe, tmp_path / "run")
    assert run.loop()
    assert run.counters["step"] == 3


def test_a_state_without_settings_goes_on(tmp_path, packs):
    take_steps(_recipe(packs, 1), tmp_path / "run", 2)
    state = tmp_path / "run" / STATE
    with safe_open(state, "pt") as file:
        metadata = {"state": file.metadata()["state"]}
    save_file(load_file(state), state, metadata=metadata)
    run = Run(_recipe(packs, 0.0001, seed=9), tmp_path / "run")
    assert run.loop()
    assert run.counters["step"] == 3
    with pytest.raises(ConfigError, match="seed was 9, is 0"):
        Run(_recipe(packs, 1), tmp_path / "run").loop()


def test_a_recipe_that_is_over_says_that_nothing_was_left(tmp_path, packs):
    recipe, folder = _recipe(packs, 0.0001), tmp_path / "run"
    first = _call("train", recipe, folder)
    assert first.exit_code == 0
    assert first.output.endswith(f"The model is in {folder / 'model'}.\n")
    assert "Nothing" not in first.output
    state, curve = (folder / STATE).read_bytes(), (folder / CURVE).read_text()
    second = _call("train", recipe, folder)
    assert second.exit_code == 0
    assert "Nothing was left to train" in second.output
    assert "recipe ends at minute 0.0" in second.output
    assert ((folder / STATE).read_bytes(), (folder / CURVE).read_text()) == (state, curve)


def test_one_process_trains_in_a_folder(tmp_path, packs):
    with training_in(tmp_path / "run"):
        refused = _call("train", _recipe(packs, 1), tmp_path / "run", "--fresh")
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception).startswith(f"Another process trains in {tmp_path / 'run'};")
    with training_in(tmp_path / "run"):
        assert not (tmp_path / "run" / STATE).exists()


@pytest.mark.parametrize("left", [CURVE, "model"])
def test_a_curve_or_a_model_without_a_state_is_not_written_over(tmp_path, packs, left):
    recipe, folder = _recipe(packs, 0.0001), tmp_path / "run"
    assert _call("train", recipe, folder).exit_code == 0
    for name in {STATE, CURVE} - {left}:
        (folder / name).unlink()
    if left == CURVE:
        (folder / "model").rename(tmp_path / "elsewhere")
    refused = _call("train", recipe, folder)
    assert isinstance(refused.exception, ConfigError)
    assert f"holds a {left} but no {STATE}" in str(refused.exception)
    assert (folder / left).exists()
    assert _call("train", recipe, folder, "--fresh").exit_code == 0
    assert _steps(folder) == [1]


def test_what_killed_trainings_left_is_removed_and_a_model_moved_aside_comes_back(tmp_path):
    for name in (".model.part-12", ".model.old-12", ".model.old-13"):
        (tmp_path / name).mkdir()
    for name in (f"{STATE}.12.partial", f"{CURVE}.12.partial", STATE, "note.txt"):
        (tmp_path / name).write_text("")
    with training_in(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "note.txt", STATE, "training.lock"]


def test_measuring_needs_a_state_and_leaves_the_curve(tmp_path, packs):
    recipe, folder = _recipe(packs, 1), tmp_path / "run"
    refused = _call("measure", recipe, folder)
    assert isinstance(refused.exception, ConfigError)
    assert f"{folder} holds no {STATE} to measure" in str(refused.exception)
    take_steps(recipe, folder, 2)
    before = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    (folder / CURVE).write_text(before)
    measured = _call("measure", recipe, folder)
    assert set(json.loads(measured.output.partition("\n")[2])) == {"sheet_line"}
    after = (folder / CURVE).read_text()
    assert after.startswith(before)
    assert _steps(folder) == [1, 2, 3, 4, 2]


def test_an_entry_after_a_torn_one_is_kept(tmp_path):
    curve = tmp_path / CURVE
    append_to_curve(curve, {"step": 1})
    curve.write_text(curve.read_text() + '{"step": 2, "tra')
    append_to_curve(curve, {"step": 2})
    append_to_curve(curve, {"step": 3})
    cut_curve(curve, 2)
    assert _steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("damage", ["cut short", "no header", "empty", "other metadata"])
def test_a_damaged_state_is_one_sentence(tmp_path, packs, damage):
    folder = tmp_path / "run"
    take_steps(_recipe(packs, 1), folder, 1)
    state = folder / STATE
    data = state.read_bytes()
    if damage == "other metadata":
        save_file({"a": torch.zeros(1)}, state)
    else:
        state.write_bytes({"cut short": data[: len(data) // 2], "no header": b"x" * 100, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged or cut short .* start over with --fresh"):
        Run(_recipe(packs, 1), folder)


def test_damaged_weights_to_start_from_are_one_sentence(tmp_path, packs):
    run = take_steps(_recipe(packs, 1), tmp_path / "run", 0)
    run.export(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        Run(_recipe(packs, 1, start_from=str(tmp_path / "model")), tmp_path / "other")


@pytest.mark.parametrize("size", [0, 1000, 20_000, 200_000])
def test_a_full_disk_leaves_what_was_there(tmp_path, packs, size):
    folder = tmp_path / "run"
    run = take_steps(_recipe(packs, 1), folder, 1)
    run.export(folder / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    run.counters["step"] = 2
    with _files_of_at_most(size):
        for write in (run._save, lambda: run.export(folder / "model")):
            with pytest.raises(CheckpointError, match="cannot be written") as caught:
                write()
            assert str(folder) in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before
    run._save()
    assert Run(_recipe(packs, 1), folder).counters["step"] == 2


def test_a_curve_that_cannot_be_used_ends_the_training_after_its_state(tmp_path, packs):
    folder = tmp_path / "run"
    (folder / CURVE).mkdir(parents=True)
    run = Run(_recipe(packs, 0.0001), folder)
    with pytest.raises(CheckpointError, match=f"{CURVE} cannot be read"):
        run.loop()
    assert Run(_recipe(packs, 1), folder).counters["step"] == 1
    assert (folder / "model" / "model.safetensors").is_file()
