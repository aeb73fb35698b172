"""Head training: kept examples, learning on them, and what trains."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from qzoom.config import TokenBudget
from qzoom.engine.generate import Stopwatch
from qzoom.engine.perceive import look, region_logits
from qzoom.engine.state import advance_region
from qzoom.errors import ConfigError, DataError
from qzoom.images.load import load_image
from qzoom.training.heads import agreement, build_heads, train_gate, train_region
from qzoom.training.heads_data import LabelPicture, LabelQuestion
from qzoom.training.heads_fit import fit_gate, fit_region
from qzoom.training.heads_label import known_box_labels
from qzoom.training.heads_recipe import HeadsRecipe, load_heads_recipe
from qzoom.training.heads_store import BranchExample, read_shard, write_shard
from qzoom.training.heads_zoom import balanced, label_zoom_share, zoom_label
from tests.flow import request
from tests.tiny_models import build_engine

RECIPE = HeadsRecipe(base="none", shared_layers=3, branch_layers=2, student_tokens=(12,), steps=60, batch=4)


@pytest.fixture(scope="module")
def engine():
    return build_heads(build_engine("qwen3_vl", heads=False), RECIPE)


def examples_of(engine, labels_of):
    """Four pictures with a bright quadrant each."""
    out = []
    for corner in range(4):
        picture = Image.new("RGB", (128, 96), "white")
        picture.paste("black", (corner % 2 * 64, corner // 2 * 48, corner % 2 * 64 + 64, corner // 2 * 48 + 48))
        asked = request(engine, picture, "where?", zoom="never", coarse_tokens=TokenBudget(12, 12))
        state = look(engine, [asked], Stopwatch(engine.backbone.device))[0].state
        out.append(BranchExample.of(state, labels_of(corner), {"corner": corner}))
    return out


def quadrant(corner):
    labels = torch.zeros(4, 4, dtype=torch.long)
    labels[corner // 2 * 2 : corner // 2 * 2 + 2, corner % 2 * 2 : corner % 2 * 2 + 2] = 1
    return labels


def test_the_region_branch_learns_where_to_look_and_nothing_else_moves(engine):
    base = {name: weight.clone() for name, weight in engine.backbone.model.state_dict().items()}
    examples = examples_of(engine, quadrant)
    report = fit_region(engine, examples, steps=150, batch=4, learning_rate=3e-3, seed=0)
    assert report.losses[-1] < 0.5 * report.losses[0]
    maps = [region_logits(engine, s)[0] for s in advance_region(engine, [e.state() for e in examples])]
    for corner, values in enumerate(maps):
        row, column = divmod(int(values.argmax()), values.shape[1])
        assert (row * 2 // values.shape[0], column * 2 // values.shape[1]) == (corner // 2, corner % 2)
    assert all(torch.equal(base[name], weight) for name, weight in engine.backbone.model.state_dict().items())


def test_the_gate_learns_its_targets(engine):
    examples = examples_of(engine, lambda corner: torch.tensor(corner % 2))
    report = fit_gate(engine, examples, steps=80, batch=4, learning_rate=3e-3, seed=0)
    assert report.losses[-1] < 0.3 * report.losses[0]


def test_shards_return_what_was_written(engine, tmp_path):
    examples = examples_of(engine, quadrant)
    write_shard(tmp_path / "region-0.safetensors", examples)
    again = list(read_shard(tmp_path / "region-0.safetensors"))
    assert [e.facts for e in again] == [e.facts for e in examples]
    for one, two in zip(examples, again, strict=True):
        assert torch.equal(one.hidden, two.hidden)
        assert torch.equal(one.positions, two.positions)
        assert torch.equal(one.labels, two.labels)
        assert (one.start, one.grid) == (two.start, two.grid)
    assert list(tmp_path.iterdir()) == [tmp_path / "region-0.safetensors"]


def test_agreement_counts_known_boxes_only():
    example = BranchExample(torch.zeros(1, 1), torch.zeros(3, 1), 0, (1, 1), torch.zeros(1, 1), {})
    yes, no = (dataclasses.replace(example, facts={"agrees": value}) for value in (True, False))
    assert agreement([yes, no, example, yes]) == pytest.approx(2 / 3)
    assert agreement([example]) is None


def test_training_without_labels_is_refused(engine, tmp_path):
    with pytest.raises(DataError, match="No region labels"):
        train_region(engine, RECIPE, tmp_path, lambda *_: None)


def test_training_is_the_same_for_the_same_seed(tmp_path):
    losses = []
    for _ in range(2):
        fresh = build_heads(build_engine("qwen3_vl", heads=False), RECIPE)
        write_shard(tmp_path / "region-1-0-0.safetensors", examples_of(fresh, quadrant))
        losses.append(train_region(fresh, dataclasses.replace(RECIPE, steps=10), tmp_path, lambda *_: None)[1])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("coarse", "zoomed", "label"),
    [("12.50", "12.50", 0), ("12.50", "1", 0), ("1", "12.50", 1), ("1", "2", None), ("", "", None), ("", "12.50", 1)],
)
def test_zooming_labels_the_gate_by_which_answer_is_right(coarse, zoomed, label):
    assert zoom_label(coarse, zoomed, "12.50") == label


def test_the_gate_learns_from_as_many_of_either_kind(engine, tmp_path):
    def gate_labels(values):
        made = examples_of(engine, lambda corner: torch.tensor(values[corner]))
        return [dataclasses.replace(example, facts={"label": values[i]}) for i, example in enumerate(made)]

    examples = gate_labels([0, 0, 0, 1]) + gate_labels([0, 1, 0, 0])
    chosen = balanced(examples, seed=3)
    assert [e.facts["label"] for e in chosen] == [0, 0, 1, 1]
    assert [id(e) for e in chosen] == [id(e) for e in balanced(examples, seed=3)]
    write_shard(tmp_path / "zoomgate-1-0-0.safetensors", examples)
    recipe = dataclasses.replace(RECIPE, gate_labels="zoom", gate_steps=5)
    counts, losses = train_gate(engine, recipe, tmp_path, lambda *_: None)
    assert counts == {"0": 2, "1": 2}
    assert len(losses) == 5


def test_zoom_labels_come_from_drawn_pictures_asked_both_ways(tmp_path):
    engine = build_heads(build_engine("qwen3_vl", heads=False), RECIPE)
    recipe = dataclasses.replace(RECIPE, zoom_pictures=3, questions=2, seed=1)
    seen = []
    label_zoom_share(engine, recipe, tmp_path, 0, 1, lambda: seen.append(1))
    assert len(seen) == 3
    made = [e for path in tmp_path.glob("zoomgate-*.safetensors") for e in read_shard(path)]
    for example in made:
        facts = example.facts
        assert int(example.labels) == zoom_label(facts["coarse"], facts["zoomed"], facts["reference"])
        assert facts["kind"] in ("document", "scene")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x\nstep: 3\n", "did you mean 'steps'"),
        ("base: x\ngate_labels: both\n", "must be ladder or zoom"),
        ("base: x\nladder: [64, 32, 128]\n", "rising"),
        ("base: x\nknown_boxes: [receipt]\n", "may name document and scene"),
        ("- a\n", "must be a mapping"),
        ("base: [x\n", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    path = tmp_path / "heads.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_heads_recipe(path)


def test_known_boxes_label_what_they_touch_and_leave_the_rim_open():
    picture = load_image(Image.new("RGB", (40, 40)))
    asked = tuple(LabelQuestion("?", "x", boxes) for boxes in [((10, 10, 20, 20),), (), ((0, 0, 40, 40),)])
    item = LabelPicture("scene", "scene:1", picture, asked)
    labels = known_box_labels(item, 0, (4, 4))
    assert labels.tolist() == [[-100, -100, -100, 0], [-100, 1, -100, 0], [-100, -100, -100, 0], [0, 0, 0, 0]]
    assert known_box_labels(item, 1, (4, 4)) is None
    assert known_box_labels(item, 2, (4, 4)) is None


def test_the_shipped_recipe_loads(request):
    path = request.config.rootpath / "recipes" / "tiny" / "heads.yaml"
    assert path.read_text().startswith("# qzoom train heads --recipe recipes/tiny/heads.yaml")
    assert load_heads_recipe(path).shared_layers >= 1


def test_branches_too_deep_for_the_base_are_refused():
    recipe = dataclasses.replace(RECIPE, shared_layers=6, branch_layers=2)
    with pytest.raises(ConfigError, match="choose a smaller K or T"):
        build_heads(build_engine("qwen3_vl", heads=False), recipe)
