import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from qzoom.data.questions import read_receipt_questions
from qzoom.errors import ConfigError, DataError, HeadsMissingError
from qzoom.evaluation.zoom_views import VIEWS, GapSettings, base_question, region_task
from qzoom.evaluation.zoomgap import (
    ask_views,
    compare_gaps,
    default_limit,
    enters_gap,
    is_negative,
    measure_gap,
    read_views,
)
from tests.evaluation.samples import model, receipt, row, write_split

BOX = ((10, 10, 20, 20),)  # 100 px of 100 x 200: 0.5 %


def asked(picture, index, said, *, answer="x", boxes=BOX, field="code", view="full", **values):
    name = f"{picture}#{index}" if view in ("region", "boxed") else picture
    number = 0 if view in ("region", "boxed") else index
    return row(said, answer, picture=name, index=number, boxes=boxes, field=field, **values)


def views():
    """Three placed questions, a negative, one without a place."""
    full = [
        asked("a", 0, "x"),
        asked("a", 1, "y"),
        asked("b", 0, "y", boxes=((0, 0, 100, 100),), field="date"),
        asked("b", 1, "none", answer="none", boxes=()),
        asked("b", 2, "x", boxes=()),
    ]
    region = [
        asked("a", 0, "x", view="region"),
        asked("a", 1, "x", view="region"),
        asked("b", 0, "x", view="region", error="broken"),
    ]
    boxed = [asked("a", 0, "x", view="boxed"), asked("a", 1, "y", view="boxed"), asked("b", 0, "x", view="boxed")]
    zoom = [
        asked("a", 0, "x", zoom=[(0, 0, 5, 5)]),
        asked("a", 1, "x"),
        asked("b", 0, "x"),
        asked("b", 1, "a dog", answer="none", boxes=()),
        asked("b", 2, "x", boxes=()),
    ]
    return {"full": full, "region": region, "boxed": boxed, "zoom": zoom}


def test_figures_by_hand():
    found = measure_gap(views())
    assert (found["n"], found["pictures"], found["dropped"], found["without_place"]) == (3, 2, 0, 1)
    third = pytest.approx(1 / 3)
    assert [found[view] for view in VIEWS] == [third, pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0]
    assert found["gap"] == third
    # two pictures drawn twice: a twice gives +1/2, b twice 0, one of each +1/3
    assert found["gap_interval"] == [0.0, 0.5]
    assert found["zoom_gain"] == pytest.approx(2 / 3)
    assert found["errors"] == {"full": 0, "region": 1, "boxed": 0, "zoom": 0}
    assert found["negatives"] == {"n": 1, "full": 1.0, "zoom": 0.0}
    assert found["visual_tokens"]["zoom"] == pytest.approx((110 + 100 + 100) / 3)
    assert {name: group["n"] for name, group in found["per_kind"].items()} == {"code": 2, "date": 1}
    assert found["per_kind"]["code"]["gap"] == 0.5
    assert found["per_kind"]["date"]["gap_interval"] == [0.0, 0.0]
    assert {name: group["n"] for name, group in found["per_area"].items()} == {"0.3-1%": 2, ">=10%": 1}


def test_views_that_were_not_asked_and_stopped_runs():
    rows = views()
    found = measure_gap({"full": rows["full"]})
    assert (found["gap"], found["gap_interval"], found["zoom_gain"]) == (None, None, None)
    assert found["region"] is None
    assert found["per_kind"]["code"] == {"n": 2, "full": 0.5}
    rows = views()
    rows["region"] = rows["region"][:1]
    rows["boxed"] = rows["boxed"][:2]
    found = measure_gap(rows)
    assert (found["n"], found["dropped"], found["pictures"]) == (0, 2, 0)
    assert (found["full"], found["gap"]) == (None, None)


@pytest.mark.parametrize(
    ("answer", "values", "negative"),
    [
        ("none", {}, True), ("None of these.", {}, True), ("nonesuch", {}, False),
        ("B", {"choices": ("red", "none of these")}, True), ("A", {"choices": ("red", "none of these")}, False),
        ("no", {"negative": True}, True), ("no", {}, False),
    ],
)  # fmt: skip
def test_negatives(answer, values, negative):
    question = row(answer, answer, boxes=BOX, **values)
    assert is_negative(question) is negative
    assert enters_gap(question) is not negative


def test_unreadable_rows_are_wrong_and_yes_is_counted():
    lost = row(answer="", field="unusable", error="Row 3: broken", boxes=())
    assert enters_gap(lost)
    again = row(answer="", field="unusable", error="Row 3: broken", boxes=(), picture="a#0")
    found = measure_gap({"full": [lost], "region": [again]})
    assert (found["n"], found["full"], found["region"], found["errors"]) == (1, 0.0, 0.0, {"full": 1, "region": 1})
    rows = [
        row("yes", "no", index=0, boxes=(), negative=True),
        row("Yes.", "yes", index=1, boxes=BOX),
        row("no", "no", index=2, boxes=()),
    ]
    found = measure_gap({"full": rows})
    assert found["yes_no"] == {"n": 3, "truly_yes": pytest.approx(1 / 3), "said_yes": {"full": pytest.approx(2 / 3)}}
    assert found["negatives"] == {"n": 1, "full": 0.0}


def test_before_and_after():
    before, after = views(), views()
    after["full"][1] = asked("a", 1, "x")
    found = compare_gaps(after, before)
    assert (found["n"], found["dropped"]) == (3, 0)
    assert (found["full"]["this"], found["full"]["other"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["full"]["difference"] == pytest.approx(1 / 3)
    assert found["full"]["interval"] == [0.0, 0.5]
    assert found["gap"]["this"] == pytest.approx(0.0)
    assert found["gap"]["other"] == pytest.approx(1 / 3)
    assert found["gap"]["closed"] == pytest.approx(1.0)
    assert found["negatives"]["difference"] == 0.0


def test_only_common_questions_are_compared():
    before, after = views(), views()
    after["full"] = after["full"][:2]
    found = compare_gaps(after, before)
    assert (found["n"], found["dropped"], found["negatives"]) == (2, 3, None)
    rows, other = views(), views()
    other["full"][0] = asked("a", 0, "x", answer="z")
    with pytest.raises(DataError, match="same data"):
        compare_gaps(rows, other)
    with pytest.raises(DataError, match="no question in common"):
        compare_gaps(rows, {"full": [asked("q", 0, "x")]})


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
    kept, kept_about = ask_views(reader, task, SETTINGS, output=tmp_path / "run")
    assert [len(rows) for rows in kept.values()] == [5, 3, 3, 5]
    found = measure_gap(kept)
    assert (found["n"], found["pictures"], found["without_place"], found["negatives"]["n"]) == (3, 2, 1, 1)
    assert all(tokens <= 24 for tokens in found["visual_tokens"].values())
    assert {usage.usage.region_tokens for view in ("full", "region", "boxed") for usage in kept[view]} == {0}
    assert {asked.question for asked in kept["region"]} <= {asked.question for asked in kept["full"]}
    prompts = {asked.question: asked.prompt for asked in kept["full"]}
    for view in ("region", "boxed", "zoom"):
        assert all(asked.prompt == prompts[asked.question] for asked in kept[view])
    assert kept_about["task"] == "questions"
    again, again_about = read_views(tmp_path / "run")
    assert measure_gap(again) == found
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
        assert again_about[key] == kept_about[key], key


def test_a_rerun_continues(reader, task, tmp_path):
    output = tmp_path / "run"
    first, _ = ask_views(reader, task, SETTINGS, output=output, limit=1)
    lines = (output / "region.jsonl").read_bytes()
    whole, _ = ask_views(reader, task, SETTINGS, output=output)
    assert (output / "region.jsonl").read_bytes().startswith(lines)
    assert whole["region"][:2] == first["region"]
    (output / "boxed.jsonl").write_bytes((output / "boxed.jsonl").read_bytes()[:-40])  # cut off in the middle
    assert [r.prediction for r in ask_views(reader, task, SETTINGS, output=output)[0]["boxed"]] == [
        r.prediction for r in whole["boxed"]
    ]
    with pytest.raises(ConfigError, match="crop_scale was 2"):
        ask_views(reader, task, dataclasses.replace(SETTINGS, crop_scale=3.0), output=output)


def test_pictures_of_the_views(task):
    targets = (("a", 0, 0), ("b", 1, 1))
    region = region_task(task, "region", targets, SETTINGS, 32)
    assert region.ids == ("a#0", "b#1")
    # the box (10, 100, 60, 120) with half its sides added lies at (0, 90, 85, 130), twice enlarged
    assert region.sample(0).size_px == (170, 80)
    whole = Image.open(task.sample(0).image).convert("RGB")
    assert region.sample(0).image == whole.crop((0, 90, 85, 130)).resize((170, 80), Image.Resampling.LANCZOS)
    # of two places the larger one (40, 40, 80, 90), cut off at the right edge
    assert region.sample(1).size_px == (2 * (90 - 20), 2 * (115 - 15))
    boxed = region_task(task, "boxed", targets, SETTINGS, 32)
    assert boxed.sample(0).size_px == whole.size
    changed = (np.asarray(boxed.sample(0).image) != np.asarray(whole)).any(axis=2)
    assert changed.any()
    assert not changed[110, 35]
    assert base_question(row(picture="b#1")) == ("b", 1)
    with pytest.raises(DataError):
        base_question(row(picture="b"))


def test_rotated_and_palette_pictures(tmp_path):
    record = receipt("a", 60, 40)
    record["questions"] = [{"field": "code", "question": "Which?", "answer": "A", "boxes": [[0, 0, 10, 10]]}]
    folder = write_split(tmp_path, [record], pictures=False)
    palette = Image.new("P", (60, 40), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.save(folder / record["image"])
    settings = dataclasses.replace(SETTINGS, crop_margin=0.0)
    cut = region_task(read_receipt_questions(folder, "dev"), "region", (("a", 0, 0),), settings, 32).sample(0)
    assert (cut.image.mode, cut.image.getpixel((3, 3)), cut.size_px) == ("RGB", (200, 10, 20), (20, 20))
    turned = Image.new("RGB", (40, 60), "white")
    turned.paste("red", (0, 50, 10, 60))  # lower left before, upper left after a quarter turn to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / record["image"], exif=exif)
    cut = region_task(read_receipt_questions(folder, "dev"), "region", (("a", 0, 0),), settings, 32).sample(0)
    assert cut.image.getcolors() == [(400, (255, 0, 0))]


def test_a_broken_picture_is_wrong_in_every_view(reader, task, tmp_path):
    task.sample(1).image.write_bytes(b"\x89PNG no more")
    found = measure_gap(ask_views(reader, task, SETTINGS)[0])
    assert (found["n"], found["errors"]) == (3, {"full": 1, "region": 1, "boxed": 1, "zoom": 1})


def test_nothing_to_measure_and_a_model_that_cannot_zoom(reader, tmp_path, task):
    record = receipt("a")
    record["questions"] = [record["questions"][2]]
    with pytest.raises(DataError, match="no gap can be measured"):
        ask_views(reader, read_receipt_questions(write_split(tmp_path, [record]), "dev"), SETTINGS)
    with pytest.raises(DataError, match="no answers of the full view"):
        read_views(tmp_path)
    plain = model(heads=False)
    with pytest.raises(HeadsMissingError):
        ask_views(plain, task, SETTINGS)
    kept, _ = ask_views(plain, task, dataclasses.replace(SETTINGS, views=("full", "region")))
    assert list(kept) == ["full", "region"]


def test_the_limit_and_the_shipped_crop(reader, task):
    own, region = reader.config.coarse_tokens, reader.config.region_tokens
    expected = reader.engine.backbone.default_budget().max_tokens
    if own is not None:
        expected = own.max_tokens + (region or own).max_tokens
    assert default_limit(reader) == expected
    shipped = region_task(task, "region", (("a", 0, 0),), dataclasses.replace(SETTINGS, crop_scale="shipped"), 32)
    assert "No crop came with this question" in shipped.sample(0).error
    assert json.loads(json.dumps(shipped.identity))["crop_scale"] == "shipped"
