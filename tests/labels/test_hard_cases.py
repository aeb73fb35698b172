import dataclasses
import signal
import threading
from functools import partial

import pytest

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.branches import zoom_identity
from qzoom.config import TokenBudget
from qzoom.errors import BudgetSpentError, ConfigError, EndpointError
from qzoom.labels.hard_cases import (
    current_verdicts,
    hard_case_labeller,
    hard_case_report,
    judge_undecided,
    label_hard_cases,
    zoom_effect,
)
from qzoom.labels.settings import HardCaseRecipe
from qzoom.labels.workers import LabelRun, ModelSpec, label_share
from qzoom.llm.settings import CallSettings, EndpointSettings
from qzoom.model import QZoom
from qzoom.scoring.judge import open_judge
from qzoom.settings import to_dict
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Provenance, Question, Skip, Turn, Verdict, content_id
from tests.llm.stub import Stub, in_turn, serve
from tests.tiny_models import build_engine

RECIPE = HardCaseRecipe(coarse_tokens=16, region_tokens=16, max_new_tokens=4)


def test_answers_are_those_of_the_engine(questions, tmp_path):
    engine = build_engine("qwen3_vl", positions="aligned", region_threshold=0.5)
    start_store(tmp_path / "store", "mine", to_dict(RECIPE), Provenance("m"))
    for _ in range(2):  # the second time there is nothing to do
        unread = label_share(hard_case_labeller(engine, recipe=RECIPE), questions, tmp_path / "store")
        assert ["gone.png of question 'c' is missing" in reason for reason in unread] == [True]
    store = RecordStore(tmp_path / "store")
    verdicts = [verdict for _, verdict in store.of_kind(Verdict)]
    assert [verdict.turn for verdict in verdicts] == [0, 2]
    model = QZoom(engine)
    limits = {"coarse_tokens": TokenBudget(1, 16), "region_tokens": TokenBudget(1, 16), "max_new_tokens": 4}
    for verdict in verdicts:
        text = questions[0].turns[verdict.turn].question
        coarse = model.ask(tmp_path / "a.png", text, zoom="never", **limits)
        zoomed = model.ask(tmp_path / "a.png", text, zoom="always", **limits)
        assert (verdict.coarse, verdict.zoomed) == (coarse.text, zoomed.text)
        assert verdict.boxes == tuple(region.box for region in zoomed.regions)
    assert ["No turn has an answer" in skip.reason for _, skip in store.of_kind(Skip)] == [True]


CASES = {  # coarse, zoomed, rights: answers are "a cat"
    "hard": ("a cat", "7", True, False),
    "improvements": ("", "a cat", False, True),
    "both_right": ("a cat", "a cat", True, True),
    "both_wrong": ("", "", False, False),
    "undecided": ("the cat", "a dog", None, None),
    "undecided too": ("a cat", "the cat", True, None),
}


@pytest.fixture
def folder(tmp_path):
    start_store(tmp_path / "store", "mine", {}, Provenance("m"))
    with RecordWriter(tmp_path / "store") as out:
        for name, (coarse, zoomed, *rights) in CASES.items():
            question = Question(name, "a.png", (Turn(f"What is {name}?", ("a cat",)),))
            by = "nobody" if None in rights else "rule"
            out.append(name, [(question, {}), (Verdict(content_id(question), 0, coarse, zoomed, *rights, by), {})])
    return tmp_path / "store"


def judge_at(url, **settings):
    return open_judge(EndpointSettings(url, "m"), CallSettings(backoff_s=0.0, **settings))


def test_kinds_are_kept_apart(folder):
    report = hard_case_report(folder)
    assert (report.hard, report.improvements, report.both_right, report.both_wrong, report.undecided) == (1, 1, 1, 1, 2)
    verdicts = current_verdicts(RecordStore(folder))
    assert [zoom_effect(verdict) for verdict in verdicts][:4] == ["hard", "improvements", "both_right", "both_wrong"]


def says(body):
    return "yes" if "the cat" in body["messages"][-1]["content"] else "no"


def test_the_judge_decides_what_is_open_and_only_that(folder):
    script = Stub(in_turn(says))
    with serve(script) as url:
        judge_undecided(folder, judge_at(url), parallel=2)
        report = hard_case_report(folder)
        assert (report.hard, report.both_right, report.undecided) == (2, 2, 0)
        assert len(script.bodies) == 3  # two answers, and one whose other the rules had decided
        judge_undecided(folder, judge_at(url))
        assert len(script.bodies) == 3
    judged = [v for v in current_verdicts(RecordStore(folder)) if v.by == "judge"]
    assert [(v.coarse_right, v.zoomed_right) for v in judged] == [(True, False), (True, True)]


def test_another_judge_is_refused(folder):
    with serve(Stub(in_turn("perhaps"))) as url:
        judge_undecided(folder, open_judge(EndpointSettings(url, "other"), CallSettings(backoff_s=0.0, retries=0)))
    with serve(Stub(in_turn(says))) as url:  # it has stored no verdict
        with pytest.raises(BudgetSpentError):
            judge_undecided(folder, judge_at(url, budget_requests=2), parallel=1)
        other = open_judge(EndpointSettings(url, "other"), CallSettings(backoff_s=0.0))
        with pytest.raises(ConfigError, match=r"verdicts of another judge \('m', not 'other'\).*--fresh"):
            judge_undecided(folder, other)
        judge_undecided(folder, judge_at(url))
    assert hard_case_report(folder).undecided == 0


def test_labels_of_another_branch_are_refused_and_a_judge_may_come_later(questions, tmp_path):
    save_pretrained(build_engine("qwen3_vl"), tmp_path / "one", include_base=True)
    save_pretrained(build_engine("qwen3_vl", region_threshold=0.5), tmp_path / "two", include_base=True)
    run = LabelRun(ModelSpec(str(tmp_path / "one")), tmp_path / "store")
    assert label_hard_cases(run, questions[:1], RECIPE).turns == 2
    zoom = RecordStore(run.folder).settings["zoom"]
    assert zoom == zoom_identity(run.model.load())
    with serve(Stub(in_turn(says))) as url:
        report = label_hard_cases(run, questions, RECIPE, judge=judge_at(url))
    assert (report.unread, report.undecided) == (1, 0)
    with pytest.raises(ConfigError, match=r"settings.zoom.config.region_threshold was 0.6, is 0.5"):
        label_hard_cases(dataclasses.replace(run, model=ModelSpec(str(tmp_path / "two"))), questions, RECIPE)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_gives_the_requests_up_and_sends_no_more(folder):
    pair = threading.Barrier(2, partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT))

    def answer(body, before):
        if len(stub.bodies) > 2:
            return says(body)
        pair.wait(60)
        return "hang"

    stub = Stub(answer)
    with serve(stub) as url:
        with pytest.raises(KeyboardInterrupt):
            judge_undecided(folder, judge_at(url), parallel=2)
        assert len(stub.bodies) == 2
        judge_undecided(folder, judge_at(url), parallel=2)
    assert hard_case_report(folder).undecided == 0


def test_failures_stay_open_are_counted_and_tried_again(folder):
    with serve(Stub(in_turn("perhaps"))) as url:
        judge = judge_at(url, retries=0)
        judge_undecided(folder, judge)
        report = hard_case_report(folder, judge)
    assert (report.undecided, report.judge_failures) == (2, 2)
    assert "neither yes nor no" in report.reasons[0]
    with serve(Stub(in_turn(says))) as url:
        judge_undecided(folder, judge_at(url))
    assert hard_case_report(folder).undecided == 0


def test_a_spent_budget_keeps_what_was_judged(folder):
    with serve(Stub(in_turn(says))) as url:
        with pytest.raises(BudgetSpentError):
            judge_undecided(folder, judge_at(url, budget_requests=2), parallel=1)
        assert hard_case_report(folder).undecided == 1
        judge_undecided(folder, judge_at(url), parallel=1)
    assert hard_case_report(folder).undecided == 0


def test_a_refused_key_stops_the_run_and_settings_may_not_change(folder):
    with serve(Stub(in_turn((401, {})))) as url, pytest.raises(EndpointError, match="refuses the key"):
        judge_undecided(folder, judge_at(url))
    assert hard_case_report(folder).undecided == 2
    with pytest.raises(ConfigError, match="was made with other settings"):
        start_store(folder, "mine", to_dict(RECIPE), Provenance("m"))
