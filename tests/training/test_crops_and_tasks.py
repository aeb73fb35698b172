"""Crops stay inside the picture, and every exercise gives examples that hold together."""

import json

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ConfigError, DataError
from qzoom.training.crops import crop_around, inside, region_tokens, snippet_box
from qzoom.training.receipts import ReceiptSet, load_receipts, target_text
from qzoom.training.tasks import TASKS, make_examples


def test_boxes_stay_inside_and_mostly_hold_the_target():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        width, height = (int(side) for side in rng.integers(200, 2400, size=2))
        x, y = int(rng.integers(0, width - 60)), int(rng.integers(0, height - 30))
        target = (x, y, min(width, x + int(rng.integers(5, 300))), y + int(rng.integers(5, 29)))
        region = crop_around(target, (width, height), rng, float(rng.uniform(20, 120)))
        snippet = snippet_box(target, (width, height), float(rng.uniform(10, 40)), (8, 3), rng)
        for box in (region, snippet):
            assert 0 <= box[0] < box[2] <= width
            assert 0 <= box[1] < box[3] <= height
        held += region[0] <= target[0] + 1 and region[2] >= target[2] - 1
        w, h = region_tokens(region, rng)
        assert 1 <= w * h <= 144
    assert held > 1700


@pytest.mark.parametrize(
    "task", ["tags", "glyphs", "line", "strip", "snippet", "pair", "cards", "scene_pair", "page_64"]
)
def test_examples_hold_together(task):
    first = make_examples(task, np.random.default_rng(3), held_out=True)
    second = make_examples(task, np.random.default_rng(3), held_out=True)
    assert len(first) == len(second) >= 1
    for one, two in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.views, two.views, strict=True))
        assert [(q.question, q.answer) for q in one.queries] == [(q.question, q.answer) for q in two.queries]
        assert bool(one.queries) == (task != "glyphs")
        assert len(one.views) == (2 if task.endswith("pair") else 1)
        for view in one.views:
            assert view.shape[0] % 32 == 0
            assert view.shape[1] % 32 == 0
        for query in one.queries:
            if query.points is not None:
                assert query.points.shape == (len(query.answer), len(one.views), 2)


def test_the_target_of_a_snippet_is_in_view():
    for example in make_examples("snippet", np.random.default_rng(5)):
        points = example.queries[0].points
        assert points is not None
        seen = ~np.isnan(points[:, 0, 0])
        assert seen.mean() > 0.9 or " " in example.queries[0].answer


def test_plain_looks_keep_their_budget():
    for budget in (64, 144, 288):
        for example in make_examples(f"page_{budget}", np.random.default_rng(1)):
            height, width, _ = example.views[0].shape
            assert height // 32 * (width // 32) <= budget


def test_no_exercise_asks_the_same_question_twice_about_a_picture():
    for task in ("snippet", "pair", "cards"):
        for example in make_examples(task, np.random.default_rng(8), held_out=True):
            asked = [query.question for query in example.queries]
            assert len(asked) == len(set(asked))


def test_real_receipts_need_their_folder():
    assert "receipt_pair" in TASKS
    with pytest.raises(ConfigError, match="set `receipts` in the recipe"):
        make_examples("receipt_pair", np.random.default_rng(0))


def _write(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")


def test_receipts_are_read_and_cropped(tmp_path):
    Image.new("RGB", (600, 1200), "white").save(tmp_path / "a.png")
    question = {
        "field": "total",
        "question": "What is the total amount?",
        "answer": "RM 9.50",
        "boxes": [[400, 800, 480, 830]],
    }
    row = {"id": "a", "image": "a.png", "width": 600, "height": 1200, "questions": [question]}
    _write(tmp_path, [json.dumps(row)])
    receipts = ReceiptSet(load_receipts(tmp_path, "train"), ())
    assert receipts.train[0].questions[0].answer == "9.50"
    for task, views in (("receipt_pair", 2), ("receipt_snippet", 1), ("receipt_plain", 1)):
        examples = make_examples(task, np.random.default_rng(1), receipts=receipts)
        assert all(len(example.views) == views for example in examples)
        assert all(example.queries[0].answer == "9.50" for example in examples)
    assert inside(receipts.train[0].questions[0], (390, 790, 500, 900))
    assert not inside(receipts.train[0].questions[0], (0, 0, 300, 300))


def test_malformed_receipts_are_named(tmp_path):
    _write(tmp_path, ['{"id": "a"}'])
    with pytest.raises(DataError, match="line 1"):
        load_receipts(tmp_path, "train")
    with pytest.raises(DataError, match="no such question file"):
        load_receipts(tmp_path, "missing")


def test_target_text_is_what_the_model_should_write():
    assert target_text("total", "RM 68.10") == "68.10"
    assert target_text("total", "$8.60") == "8.60"
    assert target_text("company", "Kedai  Papan") == "KEDAI PAPAN"
    assert target_text("date", "18 Mar 2018") == "18 Mar 2018"
