"""Windows hold a region and what may be asked about it; the order of a run decides them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from qzoom.data.overlay import Fade
from qzoom.errors import ConfigError
from qzoom.training.student.collate import Collator, Prompter
from qzoom.training.student.data import Question, read_split
from qzoom.training.student.recipe import load_distill_recipe
from qzoom.training.student.schedule import Row, Windows, make_order, questions_inside, shifted, window_around
from tests.tiny_models import engine
from tests.training.student.conftest import recipe_of

ALWAYS = Windows(Fade(1.0, 1.0, "constant"), (9,), 1.0)


@pytest.mark.parametrize("target", [(0, 0, 30, 20), (700, 500, 800, 600), (300, 290, 340, 300), (10, 10, 790, 30)])
def test_a_window_holds_its_target_and_is_as_sharp_as_asked(target):
    size_px, cells, whole = (800, 600), 200 * 200, 0.25
    areas = []
    for seed in range(200):
        x0, y0, x1, y1 = window_around(target, size_px, cells, whole, ALWAYS, random.Random(seed))
        assert 0 <= x0 <= target[0] < target[2] <= x1 <= 800
        assert 0 <= y0 <= target[1] < target[3] <= y1 <= 600
        areas.append((x1 - x0) * (y1 - y0))
    small, large = min(areas), max(areas)
    assert small >= 0.9 * min(cells, 800 * 600)  # as sharp as the picture
    assert large > 0.6 * 800 * 600  # nearly the whole
    assert large <= 800 * 600


def test_a_window_at_the_edge_may_lie_anywhere_around_its_target():
    starts = {
        window_around((400, 300, 410, 310), (800, 600), 100 * 100, 0.9, ALWAYS, random.Random(s))[0] for s in range(99)
    }
    assert min(starts) < 340
    assert max(starts) > 380


def test_only_what_lies_inside_is_asked():
    box = Question("a", "p", "?", "x", box=(10, 10, 20, 20))
    out = replace(box, box=(60, 10, 80, 20))
    absent = replace(out, negative=True)
    nowhere = replace(box, box=None)
    window = (5, 5, 70, 50)
    assert questions_inside([box, absent, nowhere], window, 0) == [box, absent]
    kept = [questions_inside([box, out, absent, nowhere], window, seed) for seed in range(400)]
    assert all(found in ([box], [box, absent]) for found in kept)
    assert sum(found == [box, absent] for found in kept) == pytest.approx(200, abs=50)
    assert questions_inside([out, absent], window, 0) == []
    assert shifted(box.box, window) == (5, 5, 15, 15)
    assert shifted(out.box, window) is None
    assert shifted(None, window) is None


def test_the_order_says_which_steps_show_windows():
    questions = [Question(str(i), f"p{i}", "?", "x", box=(0, 0, 5, 5)) for i in range(10)]
    told = {"steps": 60, "batch": 4, "most": 2, "tokens": (), "negatives": None, "replay": 0.0, "seed": 3}
    windows = Windows(Fade(1.0, 0.0, "linear"), (9, 16), 1.0)
    rows = make_order(questions, **told, windows=windows)
    steps = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert all(len({row.window for row in step}) == 1 for step in steps)
    shown = [step[0].window for step in steps]
    assert set(shown) == {0, 9, 16}
    assert sum(map(bool, shown[:20])) > sum(map(bool, shown[-20:])) + 5
    assert len({row.place for row in rows if row.window}) > 50
    assert rows == make_order(questions, **told, windows=windows)
    assert [row.questions for row in rows] == [row.questions for row in make_order(questions, **told)]


def test_a_windowed_row_shows_a_part_with_its_regions(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    prompter = Prompter(student, recipe_of(tmp_path, data, styles={"rectangle": 1.0}, windows=ALWAYS))
    group = tuple(i for i, q in enumerate(split.train) if q.picture == split.train[0].picture)
    seen = set()
    for place in range(12):
        row = Row(group, 0, 0.0, 12, window=4, place=place)
        (sequence,) = Collator(prompter, split.train, [row], regions=True).sequences(row)
        part, window = prompter.part([split.train[i] for i in group], row)
        assert part.size == (window[2] - window[0], window[3] - window[1])
        seen.add(window)
        assert max(window[:2]) <= 16
        assert min(window[2:]) >= 48
        assert sequence.view.cells[0] * sequence.view.cells[1] <= 4
        assert int(sequence.branch.max()) == len(group)
        visual = (sequence.ids == student.backbone.image_token_id).nonzero()[:, 0]
        asked = [split.train[i] for i in group]
        for question, region in zip(asked, sequence.regions, strict=True):
            assert bool(region.any())
            assert set(region.nonzero()[:, 0].tolist()) <= set(visual.tolist())
            assert question.box == (16, 16, 48, 48)
    assert len(seen) > 3
    batch = Collator(prompter, split.train, [row], regions=True)([{"row": 0}])
    assert torch.equal(batch["regions"][0], sequence.regions)


@pytest.mark.parametrize("box", [None, (0, 0, 9000, 9000)], ids=["no region", "a region beyond the picture"])
def test_where_no_window_shows_a_region_the_whole_is_shown_as_in_other_steps(data, tmp_path, box):
    split = read_split(data, tmp_path, 0.0, 0)
    absent = [replace(q, negative=True) for q in split.train[:2]]
    group = [*absent, replace(absent[0], negative=False, box=box)]
    recipe = recipe_of(tmp_path, data, windows=ALWAYS, styles={"none": 1.0})
    collator = Collator(Prompter(engine("qwen3_vl"), recipe), group, [])
    numbers = tuple(range(len(group)))
    (windowed,) = collator.sequences(Row(numbers, 0, 0.0, 12, window=4))
    (whole,) = collator.sequences(Row(numbers, 0, 0.0, 12))
    assert windowed.view.cells == whole.view.cells
    assert torch.equal(windowed.ids, whole.ids)


def test_pixels_come_in_the_precision_that_is_computed_in(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    rows, student, made = [Row((0,), 0, 0.0, 12)], engine("qwen3_vl"), {}
    for precision in ("float32", "bfloat16"):
        prompter = Prompter(student, recipe_of(tmp_path, data, precision=precision))
        made[precision] = Collator(prompter, split.train, rows)([{"row": 0}])["pixel_values"]
    assert made["bfloat16"].dtype == torch.bfloat16
    assert torch.equal(made["bfloat16"], made["float32"].bfloat16())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("windows: {tokens: []}", "list of whole numbers"),
        ("windows: {tokens: 9}", "list of whole numbers"),
        ("windows: {scale: 0}", "above 0"),
        ("windows: {scale: 1.5}", "up to 1"),
        ("windows: {share: {frist: 1}}", "did you mean `first`|did you mean 'first'"),
        ("windows: {share: 0.5}", "mapping"),
        ("windows: {size: 3}", "unknown key"),
    ],
)
def test_bad_settings_are_refused(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: tiny\n{text}\n")
    with pytest.raises(ConfigError, match=words):
        load_distill_recipe(path)


def test_settings_come_from_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: tiny\nwindows: {share: {first: 0.8, last: 0.2}, tokens: [100, 144], scale: 0.5}\n")
    recipe = load_distill_recipe(path)
    assert recipe.windows == Windows(Fade(0.8, 0.2), (100, 144), 0.5)
    assert recipe.decisive()["windows"]["share"]["first"] == 0.8
