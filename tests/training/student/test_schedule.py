import random
from dataclasses import replace

import pytest
import torch

from qzoom.data.overlay import ShareSchedule
from qzoom.errors import ConfigError
from qzoom.settings import read_settings
from qzoom.training.student.collate import Collator, Prompter
from qzoom.training.student.data import ExportedQuestion, read_split
from qzoom.training.student.recipe import StudentRecipe
from qzoom.training.student.schedule import (
    RandomCrops,
    ScheduleEntry,
    box_in_crop,
    make_schedule,
    questions_in_crop,
    random_crop,
)
from tests.tiny_models import engine
from tests.training.student.conftest import recipe_of

ALWAYS = RandomCrops(ShareSchedule(1.0, 1.0, "constant"), (9,), 1.0)


@pytest.mark.parametrize("target", [(0, 0, 30, 20), (700, 500, 800, 600), (300, 290, 340, 300), (10, 10, 790, 30)])
def test_a_crop_holds_its_target_at_the_asked_resolution(target):
    size_px, cells, scales = (800, 600), 200 * 200, (0.25, 1.0)
    areas = []
    for seed in range(200):
        x0, y0, x1, y1 = random_crop(target, size_px, cells, scales, random.Random(seed))
        assert 0 <= x0 <= target[0] < target[2] <= x1 <= 800
        assert 0 <= y0 <= target[1] < target[3] <= y1 <= 600
        areas.append((x1 - x0) * (y1 - y0))
    small, large = min(areas), max(areas)
    assert small >= 0.9 * min(cells, 800 * 600)  # as sharp as the picture
    assert large > 0.6 * 800 * 600  # nearly the whole
    assert large <= 800 * 600


def test_a_crop_at_the_edge_may_lie_anywhere_around_its_target():
    starts = {
        random_crop((400, 300, 410, 310), (800, 600), 100 * 100, (0.9, 1.0), random.Random(s))[0] for s in range(99)
    }
    assert min(starts) < 340
    assert max(starts) > 380


def test_only_what_lies_inside_is_asked():
    box = ExportedQuestion("a", "p", "?", "x", box=(10, 10, 20, 20))
    out = replace(box, box=(60, 10, 80, 20))
    absent = replace(out, negative=True)
    nowhere = replace(box, box=None)
    window = (5, 5, 70, 50)
    assert questions_in_crop([box, absent, nowhere], window, 0) == [box, absent]
    kept = [questions_in_crop([box, out, absent, nowhere], window, seed) for seed in range(400)]
    assert all(found in ([box], [box, absent]) for found in kept)
    assert sum(found == [box, absent] for found in kept) == pytest.approx(200, abs=50)
    assert questions_in_crop([out, absent], window, 0) == []
    assert box_in_crop(box.box, window) == (5, 5, 15, 15)
    assert box_in_crop(out.box, window) is None
    assert box_in_crop(None, window) is None


def test_the_schedule_says_which_steps_show_crops():
    questions = [ExportedQuestion(str(i), f"p{i}", "?", "x", box=(0, 0, 5, 5)) for i in range(10)]
    settings = {"steps": 60, "batch": 4, "most": 2, "tokens": (), "negatives": None, "rehearsal": 0.0, "seed": 3}
    crops = RandomCrops(ShareSchedule(1.0, 0.0, "linear"), (9, 16), 1.0)
    rows = make_schedule(questions, **settings, crops=crops)
    steps = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert all(len({row.crop_tokens for row in step}) == 1 for step in steps)
    shown = [step[0].crop_tokens for step in steps]
    assert set(shown) == {0, 9, 16}
    assert sum(map(bool, shown[:20])) > sum(map(bool, shown[-20:])) + 5
    assert len({row.crop_seed for row in rows if row.crop_tokens}) > 50
    assert rows == make_schedule(questions, **settings, crops=crops)
    assert [row.questions for row in rows] == [row.questions for row in make_schedule(questions, **settings)]


def test_a_cropped_entry_shows_a_crop_with_its_regions(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    student = engine("qwen3_vl")
    prompter = Prompter(student, recipe_of(tmp_path, data, styles={"rectangle": 1.0}, random_crops=ALWAYS))
    group = tuple(i for i, q in enumerate(split.train) if q.picture == split.train[0].picture)
    seen = set()
    for place in range(12):
        row = ScheduleEntry(group, 0, 0.0, 12, crop_tokens=4, crop_seed=place)
        (sequence,) = Collator(prompter, split.train, [row], regions=True).sequences(row)
        part, window = prompter.random_crop([split.train[i] for i in group], row)
        assert part.size == (window[2] - window[0], window[3] - window[1])
        seen.add(window)
        assert max(window[:2]) <= 16
        assert min(window[2:]) >= 48
        assert sequence.view.cells[0] * sequence.view.cells[1] <= 4
        assert int(sequence.segment.max()) == len(group)
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
def test_where_no_crop_shows_a_region_the_whole_is_shown_as_in_other_steps(data, tmp_path, box):
    split = read_split(data, tmp_path, 0.0, 0)
    absent = [replace(q, negative=True) for q in split.train[:2]]
    group = [*absent, replace(absent[0], negative=False, box=box)]
    recipe = recipe_of(tmp_path, data, random_crops=ALWAYS, styles={"none": 1.0})
    collator = Collator(Prompter(engine("qwen3_vl"), recipe), group, [])
    numbers = tuple(range(len(group)))
    (windowed,) = collator.sequences(ScheduleEntry(numbers, 0, 0.0, 12, crop_tokens=4))
    (whole,) = collator.sequences(ScheduleEntry(numbers, 0, 0.0, 12))
    assert windowed.view.cells == whole.view.cells
    assert torch.equal(windowed.ids, whole.ids)


def test_pixels_come_in_the_precision_that_is_computed_in(data, tmp_path):
    split = read_split(data, tmp_path, 0.0, 0)
    rows, student, made = [ScheduleEntry((0,), 0, 0.0, 12)], engine("qwen3_vl"), {}
    for precision in ("float32", "bfloat16"):
        prompter = Prompter(student, recipe_of(tmp_path, data, precision=precision))
        made[precision] = Collator(prompter, split.train, rows)([{"row": 0}])["pixel_values"]
    assert made["bfloat16"].dtype == torch.bfloat16
    assert torch.equal(made["bfloat16"], made["float32"].bfloat16())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("random_crops: {tokens: []}", "list of at least one"),
        ("random_crops: {tokens: 9}", "random_crops.tokens must be a list, each item a whole number"),
        ("random_crops: {scale: 0}", "above 0"),
        ("random_crops: {scale: 1.5}", "scale must be a number"),
        ("random_crops: {share: {frist: 1}}", "did you mean `first`|did you mean 'first'"),
        ("random_crops: {share: 0.5}", "mapping"),
        ("random_crops: {size: 3}", "unknown key"),
    ],
)
def test_bad_settings_are_refused(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: tiny\n{text}\n")
    with pytest.raises(ConfigError, match=words):
        read_settings(StudentRecipe, path)


def test_settings_come_from_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: tiny\nrandom_crops: {share: {first: 0.8, last: 0.2}, tokens: [100, 144], scale: 0.5}\n")
    recipe = read_settings(StudentRecipe, path)
    assert recipe.random_crops == RandomCrops(ShareSchedule(0.8, 0.2), (100, 144), 0.5)
    assert recipe.decisive()["random_crops"]["share"]["first"] == 0.8
