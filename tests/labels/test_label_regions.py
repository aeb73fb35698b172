"""Stage-1 labelling of a question set: what the records say is what the model did."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from qzoom.engine.chat import ChatEncoder
from qzoom.errors import ConfigError
from qzoom.images.load import load_image
from qzoom.labels.find_heads import HeadSearch, HeadSet, find_heads
from qzoom.labels.label_regions import RegionRun, base_digest, choose_heads, label_questions, report_of, sample_of
from qzoom.labels.maps import RegionLabelSettings, cells_touched, region_labels
from qzoom.labels.respond import attention_of, respond, show
from qzoom.store.records import RecordStore, start_store
from qzoom.store.schema import Attention, Provenance, Question, RegionLabel, Response, Skip, Turn
from tests.tiny_models import FAMILIES, build_engine, picture

HEADS = {"text": HeadSet(((2, 1), (4, 3))), "natural": HeadSet(((5, 0),), ((3, 2),))}
EASY = RegionLabelSettings(min_peak=0.0, ignore_share=1.0, foreground=0.95)
RUN = RegionRun(HEADS, tokens=20, max_new_tokens=4, tristate=EASY)


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


def label(engine, run, questions, folder):
    start_store(folder, "regions", run.settings(), Provenance("m"))
    label_questions(engine, run, questions, folder)
    return RecordStore(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_records_hold_what_the_model_did(family, questions, tmp_path):
    engine = build_engine(family, heads=False)
    store = label(engine, RUN, questions, tmp_path / "store")
    assert list(store.samples) == [sample_of(q) for q in questions]
    responses = {(r.question, r.turn): r for _, r in store.of_kind(Response)}
    labels = list(store.of_kind(RegionLabel))
    assert len(responses) == len(labels) == 3

    shown = show(load_image(tmp_path / "0.png"), "dynamic", 20)
    found = respond(engine, ChatEncoder(engine.backbone), shown, ["What?", "Who is it?"], max_new_tokens=4)
    for stored, made in labels[:2]:
        response = responses[made.question, made.turn]
        assert response.tokens == found.tokens[made.turn]
        assert response.text == found.texts[made.turn] == made.text
        assert made.prompt == ("What?", "Who is it?")[made.turn]
        looked = store.get(made.attention)
        assert isinstance(looked.record, Attention)
        assert looked.record.heads == HEADS["text"].pointing
        grounding, sink = (store.tensor(looked, name) for name in ("grounding", "sink"))
        expected = attention_of(engine, found, made.turn, [2, 4]).mean_of(HEADS["text"].pointing)
        np.testing.assert_allclose(grounding, expected.numpy(), atol=1e-6)
        assert grounding.shape == response.grid
        assert np.array_equal(store.tensor(stored, "labels"), region_labels(sink, grounding, EASY).labels)
        assert made.valid == int((store.tensor(stored, "labels") != -100).sum())
    assert labels[0][1].agrees is not None
    assert labels[1][1].agrees is None


def test_natural_pictures_are_asked_for_a_box_but_trained_on_the_question(questions, tmp_path):
    store = label(build_engine("qwen3_vl", heads=False), RUN, questions[1:2], tmp_path / "store")
    (response,) = [r for _, r in store.of_kind(Response)]
    (made,) = [r for _, r in store.of_kind(RegionLabel)]
    assert response.prompt.startswith("Where? ")
    assert "bounding box" in response.prompt
    assert made.prompt == "Where?"


def test_sink_heads_make_the_sink_map(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    run = dataclasses.replace(RUN, sink_by="heads", box_prompt=False)
    store = label(engine, run, questions[1:2], tmp_path / "store")
    stored, looked = next(store.of_kind(Attention))
    assert (looked.sink_by, looked.sink_heads) == ("heads", ((3, 2),))
    shown = show(load_image(tmp_path / "1.png"), "dynamic", 20)
    found = respond(engine, ChatEncoder(engine.backbone), shown, ["Where?"], max_new_tokens=4)
    expected = attention_of(engine, found, 0, [3]).mean_of([(3, 2)])
    np.testing.assert_allclose(store.tensor(stored, "sink"), expected.numpy(), atol=1e-6)


def test_a_square_look_has_the_padding_as_background(questions, tmp_path):
    run = dataclasses.replace(RUN, view="square", tokens=64)
    store = label(build_engine("qwen3_vl", heads=False), run, questions[:1], tmp_path / "store")
    (response, *_) = [r for _, r in store.of_kind(Response)]
    assert response.grid == (8, 8)
    assert response.picture_px == (180, 180)
    for stored, made in store.of_kind(RegionLabel):
        assert made.size_px == (180, 120)
        assert made.usable
        assert (store.tensor(stored, "labels")[[0, 7]] == 0).all()
    with pytest.raises(ConfigError, match="square number"):
        dataclasses.replace(RUN, view="square", tokens=20)


def test_a_missing_picture_is_a_record_and_a_rerun_does_nothing(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    store = label(engine, RUN, questions, tmp_path / "store")
    (skip,) = [r for _, r in store.of_kind(Skip)]
    assert "9.png of question 'c' is missing" in skip.reason
    before = (tmp_path / "store" / "records-00.jsonl").read_bytes()
    label(engine, RUN, questions, tmp_path / "store")
    assert (tmp_path / "store" / "records-00.jsonl").read_bytes() == before
    report = report_of(tmp_path / "store")
    assert (report.questions, report.maps, report.skipped) == (3, 3, 1)
    assert report.agreement in (0.0, 1.0)


def test_changed_settings_are_refused(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    label(engine, RUN, questions[:1], tmp_path / "store")
    with pytest.raises(ConfigError, match=r"settings.tokens was 20, is 24"):
        label(engine, dataclasses.replace(RUN, tokens=24), questions, tmp_path / "store")


def test_labelling_equals_itself_whatever_was_labelled_before(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    one = label(engine, RUN, questions, tmp_path / "one")
    label(engine, RUN, questions[1:2], tmp_path / "two")
    two = label(engine, RUN, questions, tmp_path / "two")
    assert one.samples == {sample: two.samples[sample] for sample in one.samples}


def test_heads_are_found_on_drawn_pictures():
    engine = build_engine("qwen3_vl", heads=False)
    search = HeadSearch(pictures=2, questions=2, count=3, tokens=30, max_new_tokens=3)
    found = find_heads(engine, "text", search)
    assert found.samples >= 2
    assert len(found.heads.pointing) == 3
    assert [(s.layer, s.head) for s in found.scores] == list(found.heads.pointing)
    assert found.scores[0].hit >= found.scores[1].hit >= found.scores[2].hit
    assert find_heads(engine, "text", search) == found


def test_heads_are_chosen_as_asked():
    engine = build_engine("qwen3_vl", heads=False)
    chosen, _ = choose_heads(engine, "1:2 3:0", ["text"], HeadSearch(), sinks="2:3")
    assert chosen == {"text": HeadSet(((1, 2), (3, 0)), ((2, 3),))}
    with pytest.raises(ConfigError, match="Head 9:0 does not exist; the model has 7 layers of 4 heads"):
        choose_heads(engine, "9:0", ["text"], HeadSearch())
    with pytest.raises(ConfigError, match="no table of heads"):
        choose_heads(engine, "preset", ["text"], HeadSearch())


def test_the_digest_of_a_base_sees_its_weights_not_its_number_format():
    engine = build_engine("qwen3_vl", heads=False)
    first = base_digest(engine)
    engine.backbone.model.to(torch.bfloat16)
    assert base_digest(engine) == first
    assert base_digest(build_engine("qwen3_vl")) == first
    assert base_digest(build_engine("qwen3_vl", heads=False, seed=1)) != first
    engine.backbone.layers[3].mlp.up_proj.weight.mul_(1.1)
    assert base_digest(engine) != first


def test_cells_of_a_square_stand_in_the_middle():
    cells = cells_touched([(0, 0, 50, 50)], (100, 50), (4, 4), "square")
    assert cells.tolist() == [[False] * 4, [True, True, False, False], [True, True, False, False], [False] * 4]
    assert cells_touched([(0, 0, 1, 1)], (100, 50), (2, 4), "dynamic").nonzero()[0].tolist() == [0]


def test_showing_a_square_centres_the_picture():
    shown = show(load_image(Image.new("RGB", (30, 10), "red")), "square", 9)
    assert shown.picture.image.size == (30, 30)
    assert shown.picture.image.getpixel((0, 9)) == (127, 127, 127)
    assert shown.picture.image.getpixel((0, 10)) == (255, 0, 0)
    assert (shown.budget.min_tokens, shown.budget.max_tokens) == (9, 9)
