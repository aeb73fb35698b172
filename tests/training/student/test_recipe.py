import json
import re
from pathlib import Path

import pytest

from qzoom.cli.main import run as command
from qzoom.errors import ConfigError
from qzoom.settings import read_settings
from qzoom.training.plan import find_sizes, plan_student, sizes_of
from qzoom.training.student.recipe import StudentRecipe
from qzoom.training.student.run import prepare_student
from tests.training.student.conftest import recipe_of

ROOT = Path(__file__).parents[3] / "recipes"
FILES = sorted(ROOT.glob("*/student*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_loads_begins_with_its_command_and_is_planned(path, capsys):
    recipe = read_settings(StudentRecipe, path)
    name = f"recipes/{path.parent.name}/{path.name}"
    assert path.read_text().splitlines()[0].startswith(f"# qzoom train student {name} --data DIR --output ")
    plan = plan_student(recipe)
    assert plan.trained_weights == plan.base_weights - (0 if recipe.vision else find_sizes(recipe.base).vision)
    assert command(["train", "student", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base_weights"] == plan.base_weights


@pytest.mark.parametrize("name", ["qwen3-vl-4b", "qwen3-vl-8b", "qwen2.5-vl-7b"])
def test_big_models_have_the_published_values(name):
    recipe = read_settings(StudentRecipe, ROOT / name / "student.yaml")
    part = recipe.grpo
    assert (part.learning_rate, part.group, part.clip_low, part.clip_high, part.dual_clip) == (1e-6, 8, 0.2, 0.3, 3.0)
    assert (part.batch, part.weight_decay, part.clip, part.temperature) == (96, 0.01, 1.0, 1.0)
    assert (part.max_new_tokens, part.format_weight, recipe.vision, recipe.lora_rank) == (2048, 0.0, True, 0)


def test_plan_counts_data_and_the_weights_that_train(student, data, capsys):
    plan = plan_student(recipe_of(student, data))
    assert (plan.samples, plan.images, plan.negatives, plan.held_out) == (24, 8, 8, 4)
    assert plan.base_weights == sizes_of(student).base
    assert plan.phases[0].steps == 2
    from qzoom.checkpoints.load import load_engine

    for vision in (True, False):
        recipe = recipe_of(student, data, vision=vision)
        _, weights = prepare_student(load_engine(student), recipe)
        assert sum(weight.numel() for weight in weights.values()) == plan_student(recipe).trained_weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x\nmetod: sft\n", "did you mean 'method'"),
        ("base: x\nmethod: ppo\n", "method must be one of sft, grpo, sft+grpo"),
        ("method: sft\n", "base is missing"),
        ("base: x\nsft: {learning_rat: 1}\n", "did you mean 'learning_rate'"),
        ("base: x\nsft: {batch: 6, micro_batch: 4}\n", "cannot be cut into forwards of 4"),
        ("base: x\nsft: {batch: 0}\n", "sft.batch must be a whole number of at least 1, not 0"),
        ("base: x\nsft: {schedule: steps}\n", "sft.schedule must be one of constant, linear, cosine"),
        ("base: x\nsft: 3\n", "sft must be a mapping"),
        ("base: x\ngrpo: {group: 1}\n", "grpo.group must be a whole number of at least 2"),
        ("base: x\ngrpo: {judge: {url: 'http://x'}}\n", "grpo.judge.model is missing"),
        ("base: x\ngrpo: {judge: {adress: x}}\n", "unknown key 'adress'"),
        ("base: x\nfade: {shape: steps}\n", "fade.shape must be one of constant, linear, cosine"),
        ("base: x\nstyles: {box: 1}\n", "styles must be one of rectangle"),
        ("base: x\nstyles: {dim: 0}\n", "a weight above 0"),
        ("base: x\ntokens: 288\n", "tokens must be a list"),
        ("base: x\ntokens: [0]\n", "tokens[0] must be a whole number of at least 1"),
        ("base: x\nrehearsal: 1.0\n", "rehearsal must be a number from 0 to 0.95"),
        ("base: x\nattention_supervision: {heads: []}\n", "attention_supervision.heads must be a list"),
        ("base: x\nkeep: first\n", "keep must be one of best, last"),
        ("base: x\nvision: 1\n", "vision must be true or false"),
        ("base: x\nanswer_form: json\n", "answer_form must be one of"),
        ("- x\n", "must be a mapping of settings"),
        ("base: [x\n", "is not valid YAML"),
    ],
)
def test_mistakes_are_refused(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        read_settings(StudentRecipe, path)
    assert str(path) in str(error.value)


def test_command_refuses_a_missing_recipe_and_output(tmp_path, capsys):
    assert command(["train", "student", str(tmp_path / "none.yaml"), "-o", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    path = tmp_path / "r.yaml"
    path.write_text("base: tiny\n")
    assert command(["train", "student", str(path)]) == 2
    assert "--output" in capsys.readouterr().err
    assert command(["train", "student", str(path), "-o", str(tmp_path / "out")]) == 2
    assert "--data" in capsys.readouterr().err
