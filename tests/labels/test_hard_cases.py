"""Mining: both answers as the engine gives them, rules before the judge, and failures that never become votes."""

from __future__ import annotations

import dataclasses

import pytest

from qzoom.config import TokenBudget
from qzoom.errors import BudgetSpentError, ConfigError, EndpointError
from qzoom.labels.hard_cases import MineRun, current_verdicts, judge_open, kind_of, mine_report
from qzoom.llm.settings import CallSettings, EndpointSettings
from qzoom.model import QZoom
from qzoom.scoring.judge import open_judge
from qzoom.store.records import RecordStore, RecordWriter, start_store
from qzoom.store.schema import Provenance, Question, Skip, Turn, Verdict, content_id
from tests.scoring.judge_server import Script, serve
from tests.tiny_models import build_engine, picture

RUN = MineRun(coarse_tokens=16, region_tokens=16, max_new_tokens=4)


def test_answers_are_those_of_the_engine(tmp_path):
    engine = build_engine("qwen3_vl", positions="aligned", region_threshold=0.5)
    picture(3, 260, 180).save(tmp_path / "a.png")
    root = str(tmp_path)
    questions = [
        Question(
            "a", "a.png", (Turn("What?", ("12",)), Turn("Nobody knows?"), Turn("Who?", ("x",))), "text", "s", root
        ),
        Question("b", "gone.png", (Turn("What?", ("x",)),), "text", "s", root),
        Question("c", "a.png", (Turn("Nobody knows?"),), "text", "s", root),
    ]
    start_store(tmp_path / "store", "mine", RUN.settings(), Provenance("m"))
    for _ in range(2):  # the second time there is nothing to do
        RUN(engine, questions, tmp_path / "store", 0, lambda: None)
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
    assert len([1 for _ in store.of_kind(Skip)]) == 2


CASES = {  # coarse, zoomed, rights: answers are "a cat"
    "hard": ("a cat", "7", True, False),
    "improvements": ("", "a cat", False, True),
    "kept": ("a cat", "a cat", True, True),
    "both_wrong": ("", "", False, False),
    "open": ("the cat", "a dog", None, None),
    "open too": ("a cat", "the cat", True, None),
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
    report = mine_report(folder)
    assert (report.hard, report.improvements, report.kept, report.both_wrong, report.open) == (1, 1, 1, 1, 2)
    verdicts = current_verdicts(RecordStore(folder))
    assert [kind_of(verdict) for verdict in verdicts][:4] == ["hard", "improvements", "kept", "both_wrong"]


def says(body):
    return "yes" if "the cat" in body["messages"][-1]["content"] else "no"


def test_the_judge_decides_what_is_open_and_only_that(folder):
    script = Script(says)
    with serve(script) as url:
        judge_open(folder, judge_at(url), parallel=2)
        report = mine_report(folder)
        assert (report.hard, report.kept, report.open) == (2, 2, 0)
        assert len(script.asked) == 3  # two answers, and one whose other the rules had decided
        judge_open(folder, judge_at(url))
        assert len(script.asked) == 3
    judged = [v for v in current_verdicts(RecordStore(folder)) if v.by == "judge"]
    assert [(v.coarse_right, v.zoomed_right) for v in judged] == [(True, False), (True, True)]


def test_failures_stay_open_are_counted_and_tried_again(folder):
    with serve(Script("perhaps")) as url:
        judge = judge_at(url, retries=0)
        judge_open(folder, judge)
        report = mine_report(folder, judge)
    assert (report.open, report.judge_failures) == (2, 2)
    assert "neither yes nor no" in report.reasons[0]
    with serve(Script(says)) as url:
        judge_open(folder, judge_at(url))
    assert mine_report(folder).open == 0


def test_a_spent_budget_keeps_what_was_judged(folder):
    with serve(Script(says)) as url:
        with pytest.raises(BudgetSpentError):
            judge_open(folder, judge_at(url, budget_requests=2), parallel=1)
        assert mine_report(folder).open == 1
        judge_open(folder, judge_at(url), parallel=1)
    assert mine_report(folder).open == 0


def test_a_refused_key_stops_the_run(folder):
    with serve(Script((401,))) as url, pytest.raises(EndpointError, match="refuses the key"):
        judge_open(folder, judge_at(url))
    assert mine_report(folder).open == 2


def test_images_may_move_but_settings_may_not_change(folder, tmp_path):
    assert dataclasses.replace(RUN, images="elsewhere").settings() == RUN.settings()
    with pytest.raises(ConfigError, match="was made with other settings"):
        start_store(folder, "mine", RUN.settings(), Provenance("m"))
