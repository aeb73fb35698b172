import dataclasses
import random

import pytest
import torch

from qzoom.checkpoints.load import load_engine
from qzoom.engine.cache import KVCache
from qzoom.engine.layers import SequenceSlice, run_layers
from qzoom.engine.prompt import embed_prompt
from qzoom.errors import ConfigError, DataError
from qzoom.training.samples import SampleUse
from qzoom.training.stages import StageRecipe
from qzoom.training.tasks import AnswerTask, random_cells
from qzoom.training.train_stage import prepare_engine, train_stage


def recipe_of(world, **changes):
    values = {
        "stage": "answers", "base": str(world / "base"), "labels": (str(world / "mined"),), "tokens": (12,),
        "region_tokens": 8, "zoom": {"positions": "aligned"}, "precision": "float32", "gradient_checkpointing": False,
        "trackers": (),
    }  # fmt: skip
    return StageRecipe(**values | changes)


def engine_of(world, recipe):
    return prepare_engine(load_engine(world / "base", dtype="float32"), recipe, "answers")


def test_hard_cases_and_improvements_are_mixed_as_asked(world):
    recipe = recipe_of(world)
    engine = engine_of(world, recipe)
    decode = engine.backbone.tokenizer.decode
    hard = AnswerTask(recipe, engine).samples
    assert [(s.kind, decode(s.answer[:-1]), s.answer[-1]) for s in hard] == [
        ("hard", "here", engine.backbone.eos_ids[0])
    ] * 2
    mixed = AnswerTask(recipe_of(world, mixture={"hard": 1.0, "improvements": 0.5, "both_right": 5.0}), engine).samples
    assert sorted(s.kind for s in mixed) == ["both_right", "both_right", "hard", "hard", "improvements"]
    assert {decode(s.answer[:-1]) for s in mixed if s.kind == "improvements"} == {"there"}
    with pytest.raises(ConfigError, match="must name hard cases"):
        AnswerTask(recipe_of(world, mixture={"both_right": 1.0}), engine)


def test_nothing_mined_is_an_error(world, tmp_path):
    from qzoom.store.records import start_store
    from qzoom.store.schema import Provenance

    start_store(tmp_path / "none", "mine", {}, Provenance("m"))
    recipe = recipe_of(world, labels=(str(tmp_path / "none"),))
    with pytest.raises(DataError, match="No hard cases"):
        AnswerTask(recipe, engine_of(world, recipe))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_loss_is_that_of_the_engines_forward_pass(worlds, family):
    world = worlds[family]
    recipe = recipe_of(world)
    engine = engine_of(world, recipe)
    task = AnswerTask(recipe, engine)
    draws = [SampleUse(0, 0), SampleUse(1, 3)]
    expected = 0.0
    for draw in draws:
        sample = task.samples[draw.index]
        prompt = task._prompt(engine, sample, draw)
        assert [span.role for span in prompt.spans] == ["coarse", "region"]
        assert prompt.ids[-len(sample.answer) :].tolist() == list(sample.answer)
        assert prompt.positions.is_floating_point()  # aligned
        with torch.no_grad():
            hidden, deepstack = embed_prompt(engine.backbone, prompt)
            row = SequenceSlice(hidden, prompt.positions, KVCache(), 0, deepstack)
            out = run_layers(engine.backbone, list(engine.backbone.layers), [row], first_layer=0)[0].hidden
            shares = engine.backbone.lm_logits(out).log_softmax(-1)
        start = len(prompt) - len(sample.answer)
        expected -= sum(float(shares[start + i - 1, token]) for i, token in enumerate(sample.answer))
    with torch.no_grad():
        assert float(task.loss(engine, draws)) == pytest.approx(expected, abs=1e-3)


def test_random_regions_are_drawn_as_often_as_asked(world):
    engine = engine_of(world, recipe_of(world))
    boxes = {}
    for share in (0.0, 0.5, 1.0):
        task = AnswerTask(recipe_of(world, random_box=share), engine)
        prompts = [task._prompt(engine, task.samples[0], SampleUse(0, visit)) for visit in range(12)]
        boxes[share] = [tuple(p.positions[1:, p.spans[1].start].tolist()) for p in prompts]
    assert len(set(boxes[0.0])) == 1
    assert len(set(boxes[1.0])) > 3
    kept = sum(box == boxes[0.0][0] for box in boxes[0.5])
    assert 2 <= kept <= 11


def test_random_boxes_stay_inside_and_within_their_shares():
    rng = random.Random(0)
    sides = set()
    for _ in range(500):
        x0, y0, x1, y1 = random_cells((10, 20), (0.1, 0.6), rng)
        assert 0 <= x0 < x1 <= 20
        assert 0 <= y0 < y1 <= 10
        sides |= {("h", y1 - y0), ("w", x1 - x0)}
    assert {side for kind, side in sides if kind == "h"} == {1, 2, 3, 4, 5, 6}
    assert {side for kind, side in sides if kind == "w"} == set(range(2, 13))
    assert random_cells((1, 1), (0.1, 0.6), rng) == (0, 0, 1, 1)


def test_it_learns_and_the_merged_model_answers(world, tmp_path):
    recipe = recipe_of(world, batch=2, micro_batch=2, steps=16, learning_rate=1e-3, save_steps=16)
    report = train_stage(recipe, tmp_path, base=load_engine(recipe.base, dtype="float32"))
    assert report.last_loss < 0.3 * report.first_loss
    made = load_engine(tmp_path / "model")
    assert made.region is not None
    assert made.gate is not None
    assert made.config.positions == "aligned"


def test_lora_moves_only_small_matrices(world, tmp_path):
    pytest.importorskip("peft")
    recipe = recipe_of(world, batch=2, micro_batch=2, steps=6, learning_rate=1e-2, save_steps=3, lora_rank=2)
    report = train_stage(recipe, tmp_path, base=load_engine(recipe.base, dtype="float32"))
    assert report.trained < 60_000
    assert report.last_loss < report.first_loss
    with pytest.raises(ConfigError, match="lora_rank was 2, is 4"):
        train_stage(dataclasses.replace(recipe, lora_rank=4), tmp_path, base=load_engine(recipe.base, dtype="float32"))
