import json

import numpy as np
import pytest
from PIL import Image

from qzoom.data.questions import read_questions
from qzoom.errors import ConfigError, DataError
from tests.tiny.test_train import _recipe
from tiny.batch import Example, Query
from tiny.curriculum import EXERCISES, Context, examples_of, packs_needed
from tiny.measure import dev_examples, new_texts
from tiny.pack import PackedLine
from tiny.receipt_data import ReceiptFolder, is_held_out, rows_of, target_text, value_questions
from tiny.render_views import Look, View, crop_around, region_tokens, snippet_box
from tiny.train import held_out_command, make_packs, open_packs


def _receipts(folder):
    """Forty pictures of receipts with two rows each, as the folder of the real ones is laid out."""
    folder.mkdir()
    ids = [f"r{number}" for number in range(40)]
    lines, questions = [], []
    for name in ids:
        pixels = np.full((420, 300), 230, np.uint8)
        pixels[100:118, 150:220] = 40
        Image.fromarray(pixels).save(folder / f"{name}.png")
        record = {"id": name, "image": f"{name}.png", "width": 300, "height": 420}
        rows = [{"text": "Total :", "box": [20, 100, 90, 118]}, {"text": "RM 9.50", "box": [150, 100, 220, 118]}]
        rows += [{"text": f"Line {n}", "box": [20, 130 + 24 * n, 120, 148 + 24 * n]} for n in range(6)]
        lines.append({**record, "lines": rows})
        total = {"field": "total", "question": "What is the total amount?", "answer": "RM 9.50"}
        questions.append({**record, "questions": [{**total, "boxes": [[150, 100, 220, 118]]}]})
    for name, records in (
        ("train_lines", lines),
        ("train", questions[:20]),
        ("train-more", questions[20:]),
        ("dev", questions[:3]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return folder


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    stages = [{"name": "all", "minutes": 1, "mix": dict.fromkeys(EXERCISES, 1.0)}]
    recipe = _recipe(folder, 1, stages=stages, receipts=str(_receipts(folder / "receipts")))
    make_packs(recipe)
    return open_packs(recipe)


@pytest.mark.parametrize("exercise", sorted(EXERCISES))
@pytest.mark.parametrize("held_out", [False, True])
def test_examples_hold_together(packs, exercise, held_out):
    def draw():
        context = Context(packs, np.random.default_rng(3), held_out=held_out)
        return [example for _ in range(3) for example in examples_of(exercise, context)]

    first, second = draw(), draw()
    assert len(first) == len(second) >= 1
    for one, two in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.views, two.views, strict=True))
        asked = [query.question for query in one.queries]
        assert asked == [query.question for query in two.queries]
        assert len(asked) == len(set(asked))
        assert bool(asked) != exercise.endswith(("_seen", "_views"))
        assert len(one.glyphs) == len(one.views)
        for view in one.views:
            assert view.shape[0] % 32 == view.shape[1] % 32 == 0
            assert view.dtype == np.uint8
        for query in one.queries:
            assert query.answer
            if query.points is not None:
                assert query.points.shape == (len(query.answer), len(one.views), 2)


def test_real_lines_are_capitals_and_looks_keep_their_budget(packs):
    examples = examples_of("real_line", Context(packs, np.random.default_rng(1)))
    for example in examples:
        assert example.queries[0].answer == example.queries[0].answer.upper()
        assert all(line.capitals for line in example.read_lines[0])
    assert any(example.read_lines[0] for example in examples)
    for example in examples_of("document_page", Context(packs, np.random.default_rng(1))):
        height, width, _ = example.views[0].shape
        assert height // 32 * (width // 32) <= 512


@pytest.mark.parametrize("angle", [0.0, 3.0, -2.0])
def test_a_view_knows_where_a_mark_went(angle):
    page = np.full((300, 400), 255, np.uint8)
    page[140:146, 250:256] = 0
    view = View(page, (100.0, 60.0, 356.0, 252.0), (6, 4), Look(angle_deg=angle))
    dark = np.argwhere(view.pixels[:, :, 0] < 120).mean(axis=0)[::-1]
    placed = view.place(np.array([[253.0, 143.0]], dtype=np.float32))[0]
    assert np.abs(dark - placed).max() < 1.5


def test_a_view_may_reach_outside_its_page():
    page = np.full((50, 60), 200, np.uint8)
    view = View(page, (-30.0, -10.0, 70.0, 55.0), (4, 2), Look(angle_deg=1.0, blur_px=0.5, jpeg=60, fade=0.2))
    assert view.pixels.shape == (64, 128, 3)
    assert view.pixels.min() > 180


def test_boxes_stay_inside_and_mostly_hold_the_target():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
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
    assert held > 850


def test_held_out_pictures_are_never_trained_on(tmp_path):
    folder = _receipts(tmp_path / "receipts")
    train, held_out = ReceiptFolder(folder, "train"), ReceiptFolder(folder, "held_out")
    names = [{side.page(n).name for n in range(side.header.count)} for side in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40
    assert all(is_held_out(name) for name in names[1])
    assert train.header.kind != held_out.header.kind
    held_out_command(folder, tmp_path / "held-out")
    questions = read_questions(tmp_path / "held-out" / "questions.jsonl")[0]
    assert {question.name for question in questions} == names[1]
    assert questions[0].turns[0].answers == ("RM 9.50",)


def test_missing_receipts_are_named(tmp_path, packs, monkeypatch):
    monkeypatch.delenv("QZOOM_RECEIPTS", raising=False)
    mix = {"real_line": 0.5, "album": 0.5}
    recipe = _recipe(tmp_path, 1, stages=[{"name": "a", "minutes": 1, "mix": mix}])
    with pytest.raises(DataError, match=r"train_lines\.jsonl is missing"):
        ReceiptFolder(tmp_path, "train")
    with pytest.raises(ConfigError, match="set `receipts` in the recipe"):
        make_packs(recipe)
    monkeypatch.setenv("QZOOM_RECEIPTS", str(tmp_path))
    with pytest.raises(DataError, match=r"train_lines\.jsonl is missing"):
        make_packs(recipe)
    assert not list(tmp_path.iterdir())  # nothing is drawn before
    with pytest.raises(ConfigError, match="no exercise `reading`"):
        examples_of("reading", Context(packs, np.random.default_rng(1)))
    assert packs_needed(["real_line", "album", "cards"]) == {"receipts", "documents"}


def test_values_are_asked_for_by_their_label():
    def line(text, x, y):
        return PackedLine(text, (x, y, x + 10 * len(text), y + 18))

    lines = (
        line("CASHIER", 10, 10), line(": NUR", 150, 12), line("CASH", 10, 40), line("RM 20.00", 200, 41),
        line("TEL: 03-123", 10, 70), line("DATE: 1/2/2018", 10, 100), line("THANK YOU", 10, 130),
    )  # fmt: skip
    asked = {q.question: q.answer for q in value_questions(lines)}
    assert asked == {
        "What does it say for cashier in capitals?": "NUR",
        "What is the cash?": "20.00",
        "What is the tel?": "03-123",
    }
    assert rows_of(lines)[:2] == [[0, 1], [2, 3]]


def test_target_texts_and_dev_figures(packs):
    assert target_text("total", "RM 68.10") == "68.10"
    assert target_text("total", "$8.60") == "8.60"
    assert target_text("company", "Kedai  Papan") == "KEDAI PAPAN"
    assert target_text("date", "18 Mar 2018") == "18 Mar 2018"
    found = dev_examples(packs["receipts_dev"])
    assert set(found) == {"dev_total_date", "dev_pair_total_date"}
    assert [len(example.views) for example in found["dev_pair_total_date"]] == [2, 2, 2]
    assert 32 <= found["dev_total_date"][0].tokens <= 144


def test_new_texts_are_words_that_no_training_receipt_has():
    answers = ("Corner  Shop", "SHOP", "NEW ROAD 12", "12/03/2018 A", "SHOP CORNER")
    examples = [Example("dev", (), (), (Query("What does it say?", answer),)) for answer in answers]
    several = Example("dev", (), (), (Query("What?", "NEW"), Query("Who?", "OTHER")))
    found = new_texts([*examples, several], {"CORNER SHOP"})
    assert [example.queries[0].answer for example in found] == ["SHOP", "NEW ROAD 12", "SHOP CORNER"]
