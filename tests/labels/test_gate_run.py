"""Climbing the ladder: every rung answered once, the records resumable, and what cannot be used is said."""

from __future__ import annotations

import pytest

from qzoom.engine.chat import ChatEncoder
from qzoom.errors import ConfigError
from qzoom.images.load import load_image
from qzoom.labels.gate import GateRun, LabelGate, gate_report
from qzoom.labels.respond import respond, show
from qzoom.store.records import RecordStore, start_store
from qzoom.store.schema import Ladder, Provenance, Question, Skip, Turn
from qzoom.training.gate import gate_samples
from tests.tiny_models import build_engine, picture

RUN = GateRun((4, 8, 16, 24), max_new_tokens=3)


@pytest.fixture
def questions(tmp_path):
    picture(1, 260, 180).save(tmp_path / "a.png")
    root = str(tmp_path)
    return [
        Question(
            "a", "a.png", (Turn("What?", ("x", "y")), Turn("Nobody knows?"), Turn("Who?", ("z",))), "text", "s", root
        ),
        Question("b", "a.png", (Turn("Nobody knows?"),), "text", "s", root),
        Question("c", "gone.png", (Turn("What?", ("x",)),), "text", "s", root),
    ]


def test_every_rung_is_answered_as_asked_there(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    start_store(tmp_path / "store", "gate", RUN.settings(), Provenance("m"))
    job = LabelGate(RUN)
    job(engine, questions, tmp_path / "store", 0, lambda: None)
    store = RecordStore(tmp_path / "store")
    ladders = [ladder for _, ladder in store.of_kind(Ladder)]
    assert [(ladder.turn, ladder.annotation) for ladder in ladders] == [(0, "x"), (2, "z")]
    chat, image = ChatEncoder(engine.backbone), load_image(tmp_path / "a.png")
    for place, tokens in enumerate(RUN.ladder):
        told = respond(engine, chat, show(image, "dynamic", tokens), ["What?", "Who?"], max_new_tokens=3).texts
        assert tuple(ladder.answers[place] for ladder in ladders) == told
    reasons = [skip.reason for _, skip in store.of_kind(Skip)]
    assert "No turn has an answer" in reasons[0]
    assert "gone.png of question 'c' is missing" in reasons[1]
    before = (tmp_path / "store" / "records-00.jsonl").read_bytes()
    job(engine, questions, tmp_path / "store", 0, lambda: None)
    assert (tmp_path / "store" / "records-00.jsonl").read_bytes() == before
    report = gate_report(tmp_path / "store")
    assert (report.ladders, report.skipped) == (2, 2)
    assert report.transitions + report.easy + report.dropped == 2


@pytest.mark.parametrize("ladder", [(64, 128), (64, 128, 128), (128, 64, 256), (0, 1, 2)])
def test_ladders_that_cannot_be_climbed_are_refused(ladder):
    with pytest.raises(ConfigError, match="three rising"):
        GateRun(ladder)


def fill(folder, *trajectories):
    from qzoom.store.records import RecordWriter
    from qzoom.store.schema import content_id

    start_store(folder, "gate", {}, Provenance("m"))
    with RecordWriter(folder) as out:
        for number, answers in enumerate(trajectories):
            question = Question(f"q{number}", "a.png", (Turn("?", ("x",)),))
            out.append(f"s{number}", [(question, {}), (Ladder(content_id(question), 0, RUN.ladder, answers, "x"), {})])
    return RecordStore(folder)


def test_samples_are_transitions_and_as_many_easy_ones(tmp_path):
    easy, hard, dropped = ("x",) * 4, ("a", "b", "x", "x"), ("x", "a", "x", "x")
    store = fill(tmp_path / "store", easy, hard, dropped, easy, easy, hard, ("x", "x", "a", "b"))
    samples = gate_samples([store], "consistency", 3)
    names = [sample.question.name for sample in samples]
    hard = [name for name in names if name in ("q1", "q5")]
    assert hard  # nine draws in ten keep a transition
    assert names[: len(hard)] == hard
    assert {sample.target for sample in samples if sample.question.name in hard} == {1}
    assert all(
        sample.target == 0 and sample.tokens in (4, 8)
        for sample in samples
        if sample.question.name in ("q0", "q3", "q4")
    )
    assert all(s.tokens in (4, 8) for s in samples if s.target == 1)
    assert len(samples) <= 4
    assert gate_samples([store], "consistency", 3) == samples


def test_naive_samples_compare_with_the_annotation(tmp_path):
    store = fill(tmp_path / "store", ("x",) * 4, ("a", "b", "x", "x"), ("x", "a", "x", "x"), ("a", "b", "c", "d"))
    targets = {}
    for seed in range(30):
        for sample in gate_samples([store], "prediction_vs_gt", seed):
            targets.setdefault(sample.question.name, set()).add((sample.target, sample.tokens))
    assert targets == {
        "q0": {(0, 4), (0, 8)},
        "q1": {(1, 4), (1, 8)},
        "q2": {(0, 4), (1, 8)},
        "q3": {(1, 4), (1, 8)},
    }
