"""The four views asked of a random model: which pictures it gets, budgets, continued runs."""

import dataclasses
import json

import pytest
from PIL import Image

from qzoom.data.questions import read_receipt_questions
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.zoom_views import GapSettings, PlaceTask, key_of
from qzoom.evaluation.zoomgap import ask_views, default_limit, measure_gap, read_views
from tests.evaluation.samples import model, receipt, row, write_split

SETTINGS = GapSettings(max_visual_tokens=24, crop_margin=0.5, crop_min_px=1, max_new_tokens=2)


@pytest.fixture(scope="module")
def reader():
    return model()


@pytest.fixture
def task(tmp_path):
    negative = receipt("b", 90, 260)
    negative["questions"] = [
        {"field": "cup", "question": "Is there a cup?", "answer": "no", "boxes": [], "negative": True},
        {"field": "code", "question": "Which code?", "answer": "A7", "boxes": [[5, 5, 30, 20], [40, 40, 80, 90]]},
    ]
    return read_receipt_questions(write_split(tmp_path, [receipt("a"), negative]), "dev")


def test_one_line_of_figures(reader, task, tmp_path):
    kept = ask_views(reader, task, SETTINGS, output=tmp_path / "run")
    assert [len(rows) for rows in kept.rows.values()] == [5, 3, 3, 5]
    found = measure_gap(kept.rows)
    assert (found.n, found.pictures, found.without_place, found.negatives["n"]) == (3, 2, 1, 1)
    assert all(tokens <= 24 for tokens in found.visual_tokens.values())
    assert {usage.usage.region_tokens for view in ("full", "region", "boxed") for usage in kept.rows[view]} == {0}
    assert {asked.question for asked in kept.rows["region"]} <= {asked.question for asked in kept.rows["full"]}
    prompts = {asked.question: asked.prompt for asked in kept.rows["full"]}
    for view in ("region", "boxed", "zoom"):
        assert all(asked.prompt == prompts[asked.question] for asked in kept.rows[view])
    assert kept.about["task"] == "questions"
    again = read_views(tmp_path / "run")
    assert measure_gap(again.rows) == found
    for key in (
        "max_visual_tokens",
        "crop_scale",
        "crop_margin",
        "crop_min_px",
        "box_style",
        "places",
        "zoom_mode",
        "views",
        "sha256",
    ):
        assert again.about[key] == kept.about[key], key


def test_a_rerun_continues(reader, task, tmp_path):
    output = tmp_path / "run"
    first = ask_views(reader, task, SETTINGS, output=output, limit=1)
    lines = (output / "region.jsonl").read_bytes()
    whole = ask_views(reader, task, SETTINGS, output=output)
    assert (output / "region.jsonl").read_bytes().startswith(lines)
    assert whole.rows["region"][:2] == first.rows["region"]
    (output / "boxed.jsonl").write_bytes((output / "boxed.jsonl").read_bytes()[:-40])  # cut off in the middle
    assert [r.prediction for r in ask_views(reader, task, SETTINGS, output=output).rows["boxed"]] == [
        r.prediction for r in whole.rows["boxed"]
    ]
    with pytest.raises(ConfigError, match="crop_scale was 2"):
        ask_views(reader, task, dataclasses.replace(SETTINGS, crop_scale=3.0), output=output)


def test_pictures_of_the_views(task):
    targets = (("a", 0, 0), ("b", 1, 1))
    region = PlaceTask(task, "region", targets, SETTINGS, 32)
    assert region.ids == ("a#0", "b#1")
    # the box (10, 100, 60, 120) with half its sides added lies at (0, 90, 85, 130), twice enlarged
    assert region.sample(0).size_px == (170, 80)
    whole = Image.open(task.samples[0].image).convert("RGB")
    assert region.sample(0).image == whole.crop((0, 90, 85, 130)).resize((170, 80), Image.Resampling.LANCZOS)
    # of two places the larger one (40, 40, 80, 90), cut off at the right edge
    assert region.sample(1).size_px == (2 * (90 - 20), 2 * (115 - 15))
    boxed = PlaceTask(task, "boxed", targets, SETTINGS, 32)
    assert boxed.sample(0).size_px == whole.size
    changed = [
        (x, y)
        for x in range(200)
        for y in range(140)
        if boxed.sample(0).image.getpixel((x, y)) != whole.getpixel((x, y))
    ]
    assert changed
    assert (35, 110) not in changed
    assert key_of(row(picture="b#1")) == ("b", 1)
    with pytest.raises(DataError):
        key_of(row(picture="b"))


def test_rotated_and_palette_pictures(tmp_path):
    record = receipt("a", 60, 40)
    record["questions"] = [{"field": "code", "question": "Which?", "answer": "A", "boxes": [[0, 0, 10, 10]]}]
    folder = write_split(tmp_path, [record], pictures=False)
    palette = Image.new("P", (60, 40), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.save(folder / record["image"])
    settings = dataclasses.replace(SETTINGS, crop_margin=0.0)
    cut = PlaceTask(read_receipt_questions(folder, "dev"), "region", (("a", 0, 0),), settings, 32).sample(0)
    assert (cut.image.mode, cut.image.getpixel((3, 3)), cut.size_px) == ("RGB", (200, 10, 20), (20, 20))
    turned = Image.new("RGB", (40, 60), "white")
    turned.paste("red", (0, 50, 10, 60))  # lower left before, upper left after a quarter turn to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / record["image"], exif=exif)
    cut = PlaceTask(read_receipt_questions(folder, "dev"), "region", (("a", 0, 0),), settings, 32).sample(0)
    assert cut.image.getcolors() == [(400, (255, 0, 0))]


def test_a_broken_picture_is_wrong_in_every_view(reader, task, tmp_path):
    task.samples[1].image.write_bytes(b"\x89PNG no more")
    found = measure_gap(ask_views(reader, task, SETTINGS).rows)
    assert (found.n, found.errors) == (3, {"full": 1, "region": 1, "boxed": 1, "zoom": 1})


def test_nothing_to_measure(reader, tmp_path):
    record = receipt("a")
    record["questions"] = [record["questions"][2]]
    with pytest.raises(DataError, match="no gap can be measured"):
        ask_views(reader, read_receipt_questions(write_split(tmp_path, [record]), "dev"), SETTINGS)
    with pytest.raises(DataError, match="no answers of the full view"):
        read_views(tmp_path)


def test_a_model_that_cannot_zoom(task):
    plain = model(heads=False)
    with pytest.raises(HeadsMissingError):
        ask_views(plain, task, SETTINGS)
    kept = ask_views(plain, task, dataclasses.replace(SETTINGS, views=("full", "region")))
    assert list(kept.rows) == ["full", "region"]


def test_the_limit_where_none_is_stated(reader):
    own, region = reader.config.coarse_tokens, reader.config.region_tokens
    expected = reader.engine.backbone.default_budget().max_tokens
    if own is not None:
        expected = own.max_tokens + (region or own).max_tokens
    assert default_limit(reader) == expected


def test_the_shipped_crop_is_taken_on_request_only(task):
    shipped = PlaceTask(task, "region", (("a", 0, 0),), dataclasses.replace(SETTINGS, crop_scale="shipped"), 32)
    assert "No crop came with this question" in shipped.sample(0).error
    assert json.loads(json.dumps(shipped.identity))["crop_scale"] == "shipped"
