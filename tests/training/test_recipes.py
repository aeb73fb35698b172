import dataclasses
import json
import re
from pathlib import Path

import pytest

from qzoom.backbones.registry import published_sizes
from qzoom.cli.main import run as command
from qzoom.errors import ConfigError
from qzoom.training.plan import find_sizes, plan_stage, sizes_of
from qzoom.training.stages import StageRecipe, load_stage_recipe, select, trained_stage
from qzoom.training.train_stage import train_stage
from tests.tiny_models import build_engine

ROOT = Path(__file__).parents[2] / "recipes"
NAMES = ("regions", "answers", "refit", "gate")
FILES = sorted(path for name in NAMES for path in ROOT.glob(f"*/{name}.yaml"))
FAMILY = {"qwen2.5-vl-3b": "qwen2_5_vl", "qwen2.5-vl-7b": "qwen2_5_vl", "zwz-7b": "qwen2_5_vl"}
IDS = [f"{path.parent.name}-{path.stem}" for path in FILES]
UNPLANNED = {"qwen3.5-9b": "qwen3_5", "glm-4.1v-9b": "glm4v", "qwen3-vl-30b-a3b": "qwen3_vl_moe"}
"""Their weights are not counted by `--dry-run`."""
PLANNED = [path for path in FILES if path.parent.name not in UNPLANNED]


def stage_of(path):
    return "regions" if path.stem == "refit" else path.stem


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_loads_and_begins_with_its_command(path):
    recipe = load_stage_recipe(path, stage_of(path))
    refit = " --refit" if path.stem == "refit" else ""
    first = path.read_text().splitlines()[0]
    assert first.startswith(
        f"# qzoom train {recipe.stage}{refit} --recipe recipes/{path.parent.name}/{path.name} --output "
    )


def test_every_backbone_has_all_its_stages():
    found = {folder.name: {p.stem for p in folder.glob("*.yaml")} & set(NAMES) for folder in ROOT.iterdir()}
    for name in ("qwen3-vl-4b", "qwen3-vl-8b", "zwz-4b", "zwz-8b"):
        assert found[name] == set(NAMES)
    for name in ("tiny", *FAMILY, *UNPLANNED):
        assert found[name] == set(NAMES) - {"refit"}


@pytest.mark.parametrize(
    ("zwz", "base"), [("zwz-4b", "qwen3-vl-4b"), ("zwz-7b", "qwen2.5-vl-7b"), ("zwz-8b", "qwen3-vl-8b")]
)
def test_zwz_differs_in_the_base_only(zwz, base):
    for path in sorted((ROOT / base).glob("*.yaml")):
        if path.stem not in NAMES:
            continue
        ours = load_stage_recipe(ROOT / zwz / path.name, stage_of(path))
        theirs = load_stage_recipe(path, stage_of(path))
        changed = {f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
        assert changed <= {"base", "labels", "original"}


def test_published_hyper_parameters_and_sizes():
    four = load_stage_recipe(ROOT / "qwen3-vl-4b" / "regions.yaml", "regions")
    assert (four.learning_rate, four.batch, four.epochs, four.warmup, four.clip) == (1e-4, 128, 1, 0.03, 1.0)
    assert (four.betas, four.weight_decay, four.shared_layers, four.branch_layers) == ((0.9, 0.98), 0, 24, 3)
    seven = load_stage_recipe(ROOT / "qwen2.5-vl-7b" / "regions.yaml", "regions")
    assert seven.shared_layers == 18
    answers = load_stage_recipe(ROOT / "qwen3-vl-4b" / "answers.yaml", "answers")
    assert (answers.learning_rate, answers.batch, answers.random_box, answers.random_side) == (
        1e-6,
        64,
        0.8,
        (0.1, 0.6),
    )
    assert answers.zoom == {"positions": "aligned"}
    assert load_stage_recipe(ROOT / "qwen2.5-vl-7b" / "answers.yaml", "answers").random_box == 0
    assert load_stage_recipe(ROOT / "qwen3-vl-4b" / "gate.yaml", "gate").batch == 128
    totals = {name: sizes.base for name, sizes in published_sizes().items() if name.startswith("Qwen/")}
    assert totals == {
        "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
        "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
        "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
        "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    }
    assert find_sizes("inclusionAI/ZwZ-4B") == published_sizes()["Qwen/Qwen3-VL-4B-Instruct"]


def test_a_hybrid_branch_ends_on_a_full_attention_layer():
    recipe = load_stage_recipe(ROOT / "qwen3.5-9b" / "regions.yaml", "regions")
    assert (recipe.shared_layers + recipe.branch_layers) % 4 == 0


RUN = [path for path in FILES if path.parent.name in ("qwen3-vl-4b", "qwen2.5-vl-7b", "tiny")]


@pytest.mark.parametrize("path", RUN, ids=[f"{p.parent.name}-{p.stem}" for p in RUN])
def test_runs_two_steps_on_a_model_of_the_family(worlds, tmp_path, path):
    world = worlds[FAMILY.get(path.parent.name, "qwen3_vl")]
    stage = stage_of(path)
    labels = {"regions": "regions", "answers": "mined", "gate": "gate"}[stage]
    changes = {"base": str(world / "base"), "labels": [str(world / labels)], "batch": 4, "micro_batch": 2, "steps": 2}
    changes |= {"tokens": [12], "region_tokens": 8, "trackers": []}
    recipe = load_stage_recipe(path, stage, changes)
    report = train_stage(recipe, tmp_path, refit=path.stem == "refit")
    assert report.steps == 2
    assert report.last_loss > 0
    config = json.loads((tmp_path / "model" / "qzoom_config.json").read_text())
    assert config["zoom"]["provenance"][report.stage]["recipe"]["learning_rate"] == recipe.learning_rate


@pytest.mark.parametrize("path", PLANNED, ids=[f"{path.parent.name}-{path.stem}" for path in PLANNED])
def test_a_dry_run_says_what_would_be_done(path, capsys):
    words = ["train", stage_of(path), "--recipe", str(path), "--dry-run", "--json"]
    assert command(words + (["--refit"] if path.stem == "refit" else [])) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["phases"][0]["phase"] == path.stem
    assert sum(plan["trained"].values()) > 1000
    assert plan["memory_gb"] > 0


def test_dry_run_for_people(capsys):
    assert command(["train", "regions", "--recipe", str(ROOT / "qwen3-vl-4b" / "regions.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4,437,815,808 weights" in out
    assert "region 214,971,648" in out
    assert "not there yet: runs/qwen3-vl-4b/labels/regions" in out


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_plan_counts_what_really_trains(worlds, family):
    sizes = sizes_of(worlds[family] / "base")
    engine = build_engine(family)
    assert sizes.base == sum(weight.numel() for weight in engine.backbone.model.parameters())
    for stage in ("regions", "answers", "gate"):
        recipe = StageRecipe(stage=stage, base="x", labels=("y",))
        planned = plan_stage(recipe, stage, sizes, 1000)
        assert planned.trained_weights == sum(weight.numel() for weight in select(engine, stage).values())
    assert (planned.phases[0].steps, planned.phases[0].forwards) == (8, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: regions\nbase: x\nlabels: [y]\nlearning_rat: 1\n", "did you mean 'learning_rate'"),
        ("stage: regions\nbase: x\nlabels: []\n", "at least one folder"),
        ("stage: regions\nbase: x\nlabels: y\n", "labels must be a list, each item a text that is not empty, not 'y'"),
        ("stage: regions\nlabels: [y]\n", "base is missing"),
        ("stage: regions\nbase: x\nlabels: [y]\nbatch: 0\n", "batch must be a whole number of at least 1, not 0"),
        ("stage: regions\nbase: x\nlabels: [y]\nbatch: 4.5\n", "batch must be a whole number"),
        ("stage: regions\nbase: x\nlabels: [y]\nwarmup: 2\n", "warmup must be a number from 0 to 1"),
        ("stage: regions\nbase: x\nlabels: [y]\nprecision: half\n", "precision must be one of"),
        ("stage: regions\nbase: x\nlabels: [y]\nmulti_turn: 1\n", "multi_turn must be true or false"),
        ("stage: regions\nbase: x\nlabels: [y]\nzoom: {sink: all}\n", "sink must be one of"),
        ("stage: regions\nbase: x\nlabels: [y]\nzoom: {sinks: none}\n", "did you mean 'sink'"),
        ("stage: regions\nbase: x\nlabels: [y]\nmixture: {easy: 1}\n", "mixture may name"),
        ("stage: regions\nbase: x\nlabels: [y]\ntokens: [a]\n", "tokens[0] must be a whole number of at least 1"),
        ("stage: gate\nbase: x\nlabels: [y]\n", "is a recipe of stage gate; run it with: qzoom train gate"),
        ("- a\n", "must be a mapping"),
        ("base: [x\n", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_stage_recipe(path, "regions")


def test_a_refit_is_of_regions_only(tmp_path):
    recipe = StageRecipe(stage="gate", base="x", labels=("y",))
    with pytest.raises(ConfigError, match="--refit belongs to the stage regions"):
        trained_stage(recipe, refit=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_stage_recipe(tmp_path / "none.yaml", "regions")
