import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from qzoom.checkpoints.weights import base_digest
from qzoom.engine.chat import ChatEncoder
from qzoom.errors import ConfigError, ImageError, LaterError
from qzoom.images.load import load_image
from qzoom.labels.find_heads import HeadSet
from qzoom.labels.label_regions import label_regions, region_labeller, region_report
from qzoom.labels.maps import box_labels, cells_touched, region_labels
from qzoom.labels.respond import attention_of, generate, prepare_image
from qzoom.labels.settings import LabelMapSettings, RegionRecipe
from qzoom.labels.workers import LabelRun, ModelSpec, label_share, read_picture, sample_key
from qzoom.settings import to_dict
from qzoom.store.records import RecordStore, StoreLock, missing_samples, start_store
from qzoom.store.schema import Attention, Provenance, Question, RegionLabel, Response, Skip, Turn
from tests.tiny_models import FAMILIES, build_engine, picture

HEADS = {"text": HeadSet(((2, 1), (4, 3))), "natural": HeadSet(((5, 0),), ((3, 2),))}
EASY = LabelMapSettings(min_peak=0.0, ignore_share=1.0, foreground=0.95)
RECIPE = RegionRecipe(tokens=20, max_new_tokens=4, maps=EASY)


@pytest.fixture
def questions(tmp_path):
    for number in range(3):
        picture(number, 180 + 30 * number, 120).save(tmp_path / f"{number}.png")
    one = Question(
        "a", "0.png", (Turn("What?", ("x",), ((0, 0, 40, 40),)), Turn("Who is it?")), "text", "set", str(tmp_path)
    )
    two = Question("b", "1.png", (Turn("Where?"),), "natural", "set", str(tmp_path))
    gone = Question("c", "9.png", (Turn("Where?"),), "text", "set", str(tmp_path))
    return [one, two, gone]


def label(engine, recipe, questions, folder):
    start_store(folder, "regions", to_dict(recipe), Provenance("m"))
    label_share(region_labeller(engine, recipe=recipe, heads=HEADS), questions, folder)
    return RecordStore(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_hold_what_the_model_did(family, questions, tmp_path):
    engine = build_engine(family, heads=False)
    store = label(engine, RECIPE, questions, tmp_path / "store")
    assert list(store.samples) == [sample_key(q) for q in questions[:2]]
    stored_responses = {(r.question, r.turn): r for _, r in store.of_kind(Response)}
    labels = list(store.of_kind(RegionLabel))
    assert len(stored_responses) == len(labels) == 3

    image = prepare_image(load_image(tmp_path / "0.png"), "dynamic", 20)
    responses = generate(engine, ChatEncoder(engine.backbone), image, ["What?", "Who is it?"], max_new_tokens=4)
    for stored, made in labels[:2]:
        response = stored_responses[made.question, made.turn]
        assert response.tokens == responses.tokens[made.turn]
        assert response.text == responses.texts[made.turn] == made.text
        assert made.prompt == ("What?", "Who is it?")[made.turn]
        looked = store.get(made.attention)
        assert isinstance(looked.record, Attention)
        assert looked.record.heads == HEADS["text"].pointing
        grounding, sink = (store.tensor(looked, name) for name in ("grounding", "sink"))
        expected = attention_of(engine, responses, made.turn, [2, 4]).mean_of(HEADS["text"].pointing)
        np.testing.assert_allclose(grounding, expected.numpy(), atol=1e-6)
        assert grounding.shape == response.grid
        assert np.array_equal(store.tensor(stored, "labels"), region_labels(sink, grounding, EASY).labels)
        assert made.valid == int((store.tensor(stored, "labels") != -100).sum())
    assert labels[0][1].agrees is not None
    assert labels[1][1].agrees is None


def test_natural_pictures_are_asked_for_a_box_but_trained_on_the_question(questions, tmp_path):
    store = label(build_engine("qwen3_vl", heads=False), RECIPE, questions[1:2], tmp_path / "store")
    (response,) = [r for _, r in store.of_kind(Response)]
    (made,) = [r for _, r in store.of_kind(RegionLabel)]
    assert response.prompt.startswith("Where? ")
    assert "bounding box" in response.prompt
    assert made.prompt == "Where?"


def test_sink_heads_make_the_sink_map(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    recipe = dataclasses.replace(RECIPE, sink_by="heads", box_prompt=False)
    store = label(engine, recipe, questions[1:2], tmp_path / "store")
    stored, looked = next(store.of_kind(Attention))
    assert (looked.sink_by, looked.sink_heads) == ("heads", ((3, 2),))
    image = prepare_image(load_image(tmp_path / "1.png"), "dynamic", 20)
    responses = generate(engine, ChatEncoder(engine.backbone), image, ["Where?"], max_new_tokens=4)
    expected = attention_of(engine, responses, 0, [3]).mean_of([(3, 2)])
    np.testing.assert_allclose(store.tensor(stored, "sink"), expected.numpy(), atol=1e-6)


def test_a_square_look_has_the_padding_as_background(questions, tmp_path):
    recipe = dataclasses.replace(RECIPE, view="square", tokens=64)
    store = label(build_engine("qwen3_vl", heads=False), recipe, questions[:1], tmp_path / "store")
    (response, *_) = [r for _, r in store.of_kind(Response)]
    assert (response.grid, response.picture_px) == ((8, 8), (180, 180))
    for stored, made in store.of_kind(RegionLabel):
        assert made.size_px == (180, 120)
        assert made.usable
        assert (store.tensor(stored, "labels")[[0, 7]] == 0).all()
    with pytest.raises(ConfigError, match="square number"):
        dataclasses.replace(RECIPE, view="square", tokens=20)


def test_a_damaged_picture_is_a_record_and_a_rerun_does_nothing(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    (tmp_path / "9.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])
    store = label(engine, RECIPE, questions, tmp_path / "store")
    (skip,) = [r for _, r in store.of_kind(Skip)]
    assert "9.png" in skip.reason
    before = (tmp_path / "store" / "records-00.jsonl").read_bytes()
    label(engine, RECIPE, questions, tmp_path / "store")
    assert (tmp_path / "store" / "records-00.jsonl").read_bytes() == before
    report = region_report(tmp_path / "store")
    assert (report.questions, report.maps, report.skipped) == (3, 3, 1)
    assert report.agreement in (0.0, 1.0)


@pytest.mark.parametrize("source", ["answers", "boxes"])
def test_a_question_whose_picture_cannot_be_read_waits_for_it(questions, tmp_path, source):
    run = LabelRun(ModelSpec("tiny"), tmp_path / "store")
    recipe = dataclasses.replace(RECIPE, source=source, heads="2:1", max_new_tokens=2)
    missing = label_regions(run, questions, recipe)
    assert (missing.questions, missing.unread) == (2, 1)
    assert missing.unread_reason.endswith("9.png of question 'c' is missing; name its folder or restore it.")
    assert missing_samples(run.folder) == 1
    assert label_regions(dataclasses.replace(run, images=str(tmp_path / "none")), questions, recipe).unread == 1
    picture(9, 180, 120).save(tmp_path / "9.png")
    found = label_regions(run, questions, recipe)
    assert (found.questions, found.unread, found.unread_reason) == (3, 0, "")
    assert missing_samples(run.folder) == 0


def test_pictures_that_cannot_be_opened_are_told_from_those_that_cannot_be_used(questions, tmp_path):
    with pytest.raises(LaterError, match="is missing"):
        read_picture(questions[2], "")
    with pytest.raises(LaterError, match="is missing"):
        read_picture(questions[0], str(tmp_path / "none"))
    with pytest.raises(LaterError, match=r"of question 'a' cannot be opened \(File name too long\)"):
        read_picture(dataclasses.replace(questions[0], image="x" * 300), "")
    (tmp_path / "9.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"9\.png"):
        read_picture(questions[2], "")
    if os.geteuid():
        (tmp_path / "9.png").chmod(0)
        with pytest.raises(LaterError, match="permission denied"):
            read_picture(questions[2], "")
    assert read_picture(questions[0], str(tmp_path)).size_px == (180, 120)


def test_records_of_another_run_are_refused_before_heads_are_searched_for(questions, tmp_path):
    run = LabelRun(ModelSpec("tiny"), tmp_path / "store")
    recipe = dataclasses.replace(RECIPE, heads="2:1", max_new_tokens=2)
    report = label_regions(run, questions[:1], recipe)
    assert report.maps == 2
    heads = (tmp_path / "store" / "heads.json").read_bytes()
    with pytest.raises(ConfigError, match=r"heads that were chosen in another way.*--fresh"):
        label_regions(run, questions[:1], dataclasses.replace(recipe, heads="auto"))
    with pytest.raises(ConfigError, match=r"settings.tokens was 20, is 24"):
        label_regions(run, questions[:1], dataclasses.replace(recipe, tokens=24))
    assert (tmp_path / "store" / "heads.json").read_bytes() == heads
    assert label_regions(run, questions[:1], recipe) == report


def test_a_second_command_in_the_same_folder_is_refused(questions, tmp_path):
    run = LabelRun(ModelSpec("tiny"), tmp_path / "store", fresh=True)
    recipe = dataclasses.replace(RECIPE, source="boxes")
    with StoreLock(run.folder), pytest.raises(ConfigError, match=r"is labelling into .*store; wait for it"):
        label_regions(run, questions[:1], recipe)
    assert label_regions(run, questions[:1], recipe).maps == 1


def test_labelling_equals_itself_whatever_was_labelled_before(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    one = label(engine, RECIPE, questions, tmp_path / "one")
    label(engine, RECIPE, questions[1:2], tmp_path / "two")
    two = label(engine, RECIPE, questions, tmp_path / "two")
    assert one.samples == {sample: two.samples[sample] for sample in one.samples}


def test_known_boxes_label_what_they_touch_and_ignore_the_rim():
    labels = box_labels([(10, 10, 20, 20)], (40, 40), (4, 4))
    assert labels.labels.tolist() == [[-100, -100, -100, 0], [-100, 1, -100, 0], [-100, -100, -100, 0], [0, 0, 0, 0]]
    assert (labels.box, labels.usable) == ((1, 1, 2, 2), True)
    for boxes in ([], [(0, 0, 40, 40)]):
        unusable = box_labels(boxes, (40, 40), (4, 4))
        assert not unusable.usable
        assert (unusable.labels == -100).all()


def test_labels_from_boxes_need_no_answers(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    recipe = dataclasses.replace(RECIPE, source="boxes")
    store = label(engine, recipe, questions[:2], tmp_path / "store")
    ((stored, made),) = store.of_kind(RegionLabel)
    grid = engine.backbone.grid((180, 120), prepare_image(load_image(tmp_path / "0.png"), "dynamic", 20).budget)
    assert np.array_equal(store.tensor(stored, "labels"), box_labels([(0, 0, 40, 40)], (180, 120), grid).labels)
    assert (made.prompt, made.text, made.response, made.agrees) == ("What?", "x", "", None)
    assert made.usable
    assert [skip.reason[:25] for _, skip in store.of_kind(Skip)] == [
        "Turn 2 has no answer boxe",
        "Turn 1 has no answer boxe",
    ]
    report = region_report(tmp_path / "store")
    assert (report.maps, report.usable, report.skipped, report.agreement) == (1, 1, 2, None)


def test_the_digest_of_a_base_sees_its_weights_not_its_number_format():
    engine = build_engine("qwen3_vl", heads=False)
    first = base_digest(engine)
    engine.backbone.model.to(torch.bfloat16)
    assert base_digest(engine) == first
    assert base_digest(build_engine("qwen3_vl")) == first
    assert base_digest(build_engine("qwen3_vl", heads=False, seed=1)) != first
    engine.backbone.layers[3].mlp.up_proj.weight.mul_(1.1)
    assert base_digest(engine) != first


def test_cells_and_pictures_of_a_square_stand_in_the_middle():
    cells = cells_touched([(0, 0, 50, 50)], (100, 50), (4, 4), "square")
    assert cells.tolist() == [[False] * 4, [True, True, False, False], [True, True, False, False], [False] * 4]
    assert cells_touched([(0, 0, 1, 1)], (100, 50), (2, 4), "dynamic").nonzero()[0].tolist() == [0]
    image = prepare_image(load_image(Image.new("RGB", (30, 10), "red")), "square", 9)
    assert image.picture.image.size == (30, 30)
    assert image.picture.image.getpixel((0, 9)) == (127, 127, 127)
    assert image.picture.image.getpixel((0, 10)) == (255, 0, 0)
    assert (image.budget.min_tokens, image.budget.max_tokens) == (9, 9)
