import dataclasses

import pytest

from qzoom.checkpoints.load import load_engine
from qzoom.errors import ConfigError
from qzoom.training.stages import PARTS, STAGES, StageRecipe, named_parts, select
from qzoom.training.train_stage import train_stage
from tests.tiny_models import build_engine

MOVES = {"regions": {"region"}, "answers": {"layers", "norm", "lm_head"}, "refit": {"region"}, "gate": {"gate"}}


def test_the_table_is_the_documented_one():
    assert {stage: set(trains) for stage, trains in STAGES.items()} == MOVES


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_every_weight_belongs_to_one_part(family):
    engine = build_engine(family)
    parts = named_parts(engine)
    whole = sum(w.numel() for m in (engine.backbone.model, engine.gate, engine.region) for w in m.parameters())
    assert sum(weight.numel() for _, weight in parts.values()) == whole
    assert {part for part, _ in parts.values()} == set(PARTS)
    for stage, moves in MOVES.items():
        chosen = select(engine, stage)
        assert {parts[name][0] for name in chosen} == moves
        assert {name for name, (_, weight) in parts.items() if weight.requires_grad} == set(chosen)
        idle = {n for n in parts if n.startswith("region.layers.2.") and ("v_proj" in n or "mlp" in n or "o_proj" in n)}
        assert idle
        assert not idle & set(chosen)


@pytest.mark.parametrize(
    ("row", "labels"), [("regions", "regions"), ("refit", "regions"), ("gate", "gate"), ("answers", "mined")]
)
def test_one_step_moves_what_the_table_says(world, tmp_path, row, labels):
    engine = load_engine(world / "base", dtype="float32")
    stale = {"gate": "fit it again", "region": "fit it again"}
    config = engine.config.replace(provenance={"distill": {"base_weights": "x", "stale": stale}, "by": "hand"})
    engine = dataclasses.replace(engine, config=config)
    before = {name: weight.detach().clone() for name, (_, weight) in named_parts(engine).items()}
    recipe = StageRecipe(
        stage="regions" if row == "refit" else row, base=str(world / "base"), labels=(str(world / labels),), batch=4,
        micro_batch=2, steps=1, learning_rate=1e-3, precision="float32", trackers=(), region_tokens=8,
    )  # fmt: skip
    report = train_stage(recipe, tmp_path, refit=row == "refit", base=engine)
    made = load_engine(tmp_path / "model", dtype="float32")
    facts = made.config.provenance
    assert facts["by"] == "hand"
    assert facts["distill"]["stale"].keys() == stale.keys() - MOVES[row], "what was fitted again is no longer named"
    written = named_parts(made)
    moved = {part for name, (part, weight) in written.items() if not weight.equal(before[name])}
    assert moved == MOVES[row]
    assert (report.stage, report.steps) == (row, 1)


def test_missing_branches_are_named(world, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    with pytest.raises(ConfigError, match="needs a model with a region branch"):
        select(engine, "gate")
    recipe = StageRecipe(stage="gate", base="x", labels=(str(world / "gate"),), batch=2, precision="float32")
    with pytest.raises(ConfigError, match="has no region branch"):
        train_stage(recipe, tmp_path, base=engine)
