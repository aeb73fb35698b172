import dataclasses
import random
from collections import Counter

import pytest

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.branches import zoom_identity
from qzoom.engine.chat import ChatEncoder
from qzoom.errors import ConfigError, DataError
from qzoom.images.load import load_image
from qzoom.labels.gate import (
    categorise,
    draw_label,
    gate_labeller,
    gate_report,
    label_gate,
    label_outcomes,
    select_balanced,
    select_items,
    zoom_label,
)
from qzoom.labels.respond import generate, prepare_image
from qzoom.labels.settings import GateRecipe
from qzoom.labels.workers import LabelRun, ModelSpec, label_share
from qzoom.model import QZoom
from qzoom.settings import to_dict
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Provenance, Question, ResolutionSweep, Skip, Turn, ZoomComparison, content_id
from qzoom.training.tasks import gate_samples
from tests.tiny_models import build_engine

LEVELS = (64, 128, 256, 512, 1024)


def sweep(*answers: object, truth: object = "72") -> ResolutionSweep:
    return ResolutionSweep("", 0, LEVELS[: len(answers)], answers, truth)


def shares(question: ResolutionSweep, strategy: str = "consistency") -> dict[tuple[int, int], float]:
    return {outcome: pytest.approx(share) for outcome, share in label_outcomes(question, strategy).items()}


@pytest.mark.parametrize(
    ("answers", "truth", "kind"),
    [
        (("72", "72", "72", "72", "72"), "72", "easy"),
        (("1", "3", "72", "72", "72"), "72", "hard"),
        (("1", "3", "9", "72", "72"), "72", "hard"),
        (("1", "72", "9", "72", "72"), "72", "dropped"),
        (("72", "72", "72", "72", "9"), "72", "dropped"),
        (("1", "72", "72", "72", "72"), "15", "dropped"),
        (("7.2!", "72 eur", "72", "72", "72"), "It is 72", "easy"),
    ],
)
def test_categories(answers, truth, kind):
    assert categorise(sweep(*answers, truth=truth)) == kind


def test_outcomes_by_consistency():
    assert shares(sweep(*["72"] * 5)) == {(0, 64): 1 / 3, (0, 128): 1 / 3, (0, 256): 1 / 3}
    assert shares(sweep("1", "3", "72", "72", "72")) == {(1, 64): 0.45, (1, 128): 0.45, (0, 256): 0.1}
    assert shares(sweep("1", "3", "9", "72", "72")) == {(1, 128): 0.45, (1, 256): 0.45, (-100, 64): 0.1}
    assert shares(sweep("72", "1", "72", "72", "72")) == {(-100, 64): 1.0}
    assert shares(sweep("72", "72", "72", "72", "1")) == {(-100, 64): 1.0}
    assert shares(sweep("1", "72", "72", "72", truth="9")) == {(-100, 64): 0.9, (0, 128): 0.1}


@pytest.mark.parametrize("answers", [("72",), ("72", "72")])
def test_sweeps_without_a_level_below_the_reference_are_left_out(answers):
    question = sweep(*answers)
    assert categorise(question) == "easy"
    assert label_outcomes(question) == {(-100, 64): 1.0}


def test_naive_strategy_compares_with_the_annotation():
    assert shares(sweep("72", "1", "72", "9", "9"), "prediction_vs_gt") == {
        (0, 64): 1 / 3,
        (1, 128): 1 / 3,
        (0, 256): 1 / 3,
    }
    assert shares(sweep("72"), "prediction_vs_gt") == {(0, 64): 1.0}
    assert shares(sweep("", "", ""), "prediction_vs_gt") == {(1, 64): 1.0}


def test_draws_follow_the_distribution_and_the_seed():
    question = sweep("1", "3", "72", "72", "72")
    rng = random.Random(5)
    counts = Counter(draw_label(question, rng) for _ in range(4000))
    assert set(counts) == {(1, 64), (1, 128), (0, 256)}
    assert counts[0, 256] / 4000 == pytest.approx(0.1, abs=0.02)
    assert counts[1, 64] / 4000 == pytest.approx(0.45, abs=0.03)
    one, two = random.Random(1), random.Random(1)
    assert [draw_label(question, one) for _ in range(9)] == [draw_label(question, two) for _ in range(9)]


def test_selection_keeps_hard_ones_and_contradictions_are_named():
    hard, easy, bad = sweep("1", "72", "72"), sweep("72", "72", "72"), sweep("72", "72", "1")
    pool = [easy, hard, bad, easy, easy, hard, easy]
    chosen = select_items(pool, seed=3)
    assert chosen[:2] == [1, 5]
    assert len(chosen) == 4
    assert set(chosen[2:]) <= {0, 3, 4, 6}
    assert chosen == select_items(pool, seed=3)
    assert select_items([hard, hard, easy], seed=0) == [0, 1, 2]
    assert select_items([easy, easy], seed=0) == []
    with pytest.raises(DataError, match="one answer per level"):
        ResolutionSweep("", 0, (64, 128), ("a",), "a")
    with pytest.raises(DataError, match="must rise"):
        ResolutionSweep("", 0, (128, 64), ("a", "b"), "a")


RECIPE = GateRecipe(tokens=(4, 8, 16, 24), max_new_tokens=3)


def label(engine, recipe, questions, folder):
    """Label twice: the second time there is nothing to do."""
    start_store(folder, "gate", to_dict(recipe), Provenance("m"))
    (unread,) = label_share(gate_labeller(engine, recipe=recipe), questions, folder)
    assert "gone.png of question 'c' is missing" in unread
    before = (folder / "records-00.jsonl").read_bytes()
    assert label_share(gate_labeller(engine, recipe=recipe), questions, folder) == [unread]
    assert (folder / "records-00.jsonl").read_bytes() == before
    store = RecordStore(folder)
    (reason,) = [skip.reason for _, skip in store.of_kind(Skip)]
    assert "No turn has an answer" in reason
    return store


def test_every_level_is_answered_as_asked_there(questions, tmp_path):
    engine = build_engine("qwen3_vl", heads=False)
    store = label(engine, RECIPE, questions, tmp_path / "store")
    sweeps = [sweep for _, sweep in store.of_kind(ResolutionSweep)]
    assert [(sweep.turn, sweep.annotation) for sweep in sweeps] == [(0, "x"), (2, "z")]
    chat, image = ChatEncoder(engine.backbone), load_image(tmp_path / "a.png")
    for place, tokens in enumerate(RECIPE.tokens):
        prepared = prepare_image(image, "dynamic", tokens)
        texts = generate(engine, chat, prepared, ["What?", "Who?"], max_new_tokens=3).texts
        assert tuple(sweep.answers[place] for sweep in sweeps) == texts
    report = gate_report(tmp_path / "store")
    assert (report.questions, report.skipped) == (2, 1)
    assert report.closer + report.enough + report.dropped == 2


def test_by_zoom_both_answers_are_those_of_the_engine(questions, tmp_path):
    engine = build_engine("qwen3_vl", region_threshold=0.5)
    recipe = GateRecipe(by="zoom", tokens=(12, 20), max_new_tokens=3)
    store = label(engine, recipe, questions, tmp_path / "store")
    compared = [comparison for _, comparison in store.of_kind(ZoomComparison)]
    assert [(comparison.turn, comparison.answers) for comparison in compared] == [(0, ("x", "y")), (2, ("z",))]
    assert len({comparison.tokens for comparison in compared}) == 1
    assert compared[0].tokens in recipe.tokens
    session = QZoom(engine).session(tmp_path / "a.png", coarse_tokens=(1, compared[0].tokens))
    for comparison in compared:
        text = questions[0].turns[comparison.turn].question
        coarse, zoomed = (session.ask(text, zoom=zoom, max_new_tokens=3).text for zoom in ("never", "always"))
        assert (comparison.coarse, comparison.zoomed) == (coarse, zoomed)
    assert gate_report(tmp_path / "store").questions == 2


def test_labels_by_zoom_note_the_region_branch_and_those_by_resolution_do_not(questions, tmp_path):
    save_pretrained(build_engine("qwen3_vl"), tmp_path / "model", include_base=True)
    run = LabelRun(ModelSpec(str(tmp_path / "model")), tmp_path / "zoom")
    label_gate(run, questions[:1], GateRecipe(by="zoom", tokens=(12,), max_new_tokens=2))
    assert RecordStore(run.folder).settings["zoom"] == zoom_identity(run.model.load())
    run = dataclasses.replace(run, folder=tmp_path / "sweep")
    label_gate(run, questions[:1], dataclasses.replace(RECIPE, max_new_tokens=2))
    assert "zoom" not in RecordStore(run.folder).settings


def comparison(coarse, zoomed, answers=("12.50",)):
    return ZoomComparison("q", 0, 12, coarse, zoomed, answers)


@pytest.mark.parametrize(
    ("coarse", "zoomed", "expected"),
    [("12.50", "12.50", 0), ("12.50", "1", 0), ("1", "12.50", 1), ("1", "2", None), ("", "", None), ("", "12.50", 1)],
)
def test_zooming_labels_the_gate_by_which_answer_is_right(coarse, zoomed, expected):
    assert zoom_label(comparison(coarse, zoomed)) == expected
    assert zoom_label(comparison(coarse, zoomed, ("7", "12.50"))) == expected


def test_as_many_of_either_label_are_selected():
    labels = [0, None, 0, 1, 0, 0, None, 1]
    chosen = select_balanced(labels, seed=3)
    assert sorted(labels[i] for i in chosen) == [0, 0, 1, 1]
    assert chosen == select_balanced(labels, seed=3)
    assert select_balanced([0, 0, None], seed=3) == []


@pytest.mark.parametrize("tokens", [(64, 128), (64, 128, 128), (128, 64, 256), (0, 1, 2)])
def test_levels_that_do_not_rise_are_refused(tokens):
    with pytest.raises(ConfigError, match=r"more rising|at least 1"):
        GateRecipe(tokens=tokens)


def fill(folder, *records):
    start_store(folder, "gate", {}, Provenance("m"))
    with RecordWriter(folder) as out:
        for number, record_of in enumerate(records):
            question = Question(f"q{number}", "a.png", (Turn("?", ("x",)),))
            out.append(f"s{number}", [(question, {}), (record_of(content_id(question)), {})])
    return RecordStore(folder)


def sweeps_of(*answers):
    return [lambda question, texts=texts: ResolutionSweep(question, 0, RECIPE.tokens, texts, "x") for texts in answers]


def test_samples_are_transitions_and_as_many_easy_ones(tmp_path):
    easy, hard, dropped = ("x",) * 4, ("a", "b", "x", "x"), ("x", "a", "x", "x")
    store = fill(tmp_path / "store", *sweeps_of(easy, hard, dropped, easy, easy, hard, ("x", "x", "a", "b")))
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
    answers = (("x",) * 4, ("a", "b", "x", "x"), ("x", "a", "x", "x"), ("a", "b", "c", "d"))
    store = fill(tmp_path / "store", *sweeps_of(*answers))
    targets = {}
    for seed in range(30):
        for sample in gate_samples([store], "prediction_vs_gt", seed):
            targets.setdefault(sample.question.name, set()).add((sample.target, sample.tokens))
    assert targets == {"q0": {(0, 4), (0, 8)}, "q1": {(1, 4), (1, 8)}, "q2": {(0, 4), (1, 8)}, "q3": {(1, 4), (1, 8)}}


def test_samples_by_zoom_are_as_many_of_either_target(tmp_path):
    texts = [("x", "x"), ("a", "x"), ("x", "a"), ("a", "b"), ("b", "x"), ("x", "x")]
    made = [lambda question, pair=pair: ZoomComparison(question, 0, 12, *pair, ("x",)) for pair in texts]
    samples = gate_samples([fill(tmp_path / "store", *made)], "consistency", 0)
    assert sorted(sample.target for sample in samples) == [0, 0, 1, 1]
    assert {sample.question.name for sample in samples if sample.target} == {"q1", "q4"}
    assert {sample.tokens for sample in samples} == {12}
