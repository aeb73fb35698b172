"""Rules, and a judge behind a real server that hangs, refuses, talks nonsense and breaks off."""

from __future__ import annotations

import json

import pytest

from qzoom.errors import ConfigError
from qzoom.scoring.judge import BudgetSpentError, Judge, JudgeFailure, JudgeSettings, rule
from tests.scoring.judge_server import Script, serve


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("RM 12.50", ["12.50"], True),
        ("12.50", ["12.5", "12.50"], True),
        ("12.40", ["12.50"], False),
        ("Yes", ["yes"], True),
        ("no", ["Yes"], False),
        ("yes.", ["Yes"], True),
        ("", ["anything"], False),
        ("twelve", ["12"], None),
        ("the cat", ["a cat"], None),
        ("12", ["a dozen"], None),
        ("7", ["eight", "8"], None),
    ],
)
def test_rules_decide_what_they_can(prediction, answers, right):
    assert rule(prediction, answers) is right


def judge_at(url, cache=None, **settings):
    waits = []
    made = Judge(JudgeSettings(url, "m", **settings), cache, sleep=waits.append, seed=1)
    return made, waits


def test_asks_what_it_should_and_reads_yes_and_no(monkeypatch):
    monkeypatch.setenv("QZOOM_JUDGE_KEY", "secret")
    script = Script("Yes.", "no", "**YES**")
    with serve(script) as url:
        judge, _ = judge_at(url)
        assert [judge.right("Q?", ["a"], text) for text in ("x", "y", "z")] == [True, False, True]
        judge.close()
    assert script.asked[0]["path"] == "/v1/chat/completions"
    assert script.asked[0]["model"] == "m"
    assert script.asked[0]["temperature"] == 0
    facts = json.loads(script.asked[0]["messages"][-1]["content"])
    assert facts == {"question": "Q?", "right_answers": ["a"], "given_answer": "x"}
    assert script.headers[0]["Authorization"] == "Bearer secret"


def test_nothing_is_asked_twice_even_by_another_run(tmp_path):
    script = Script("yes")
    cache = tmp_path / "judge.jsonl"
    with serve(script) as url:
        judge, _ = judge_at(url, cache)
        assert judge.right("Q?", ["a"], "x")
        assert judge.right("Q?", ["a"], "x")
        judge.close()
        cache.write_bytes(cache.read_bytes() + b'{"key": "half')  # killed while writing
        again, _ = judge_at(url, cache)
        assert again.right("Q?", ["a"], "x")
        assert again.right("Q?", ["a"], "new")
        assert (again.counts.cached, again.counts.requests) == (1, 1)
        again.close()
        third, _ = judge_at(url, cache)
        assert third.right("Q?", ["a"], "new")
        assert third.counts.requests == 0
        third.close()
    assert len(script.asked) == 2


def test_failures_that_pass_are_retried_with_growing_random_pauses():
    script = Script((429, {"Retry-After": "7"}), (500,), "drop", b"nonsense", "perhaps", "yes")
    with serve(script) as url:
        judge, waits = judge_at(url, retries=5, backoff_s=1.0, longest_s=60.0)
        assert judge.right("Q?", ["a"], "x")
        judge.close()
    assert waits[0] == 7.0
    assert len(waits) == 5
    assert all(0 <= wait <= 2**attempt for attempt, wait in enumerate(waits[1:], start=1))
    assert len(set(waits)) == 5
    assert judge.counts.requests == 6
    assert judge.counts.failures == 0


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("maybe", "neither yes nor no: 'maybe'"),
        ("yes and no", "neither yes nor no"),
        (b"<html>", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        ((500,), "status 500"),
        ((429,), "status 429"),
        ("drop", "no connection"),
        ("hang", "no reply within 0.2 s"),
    ],
)
def test_failures_that_stay_are_counted_and_no_votes(behaviour, reason, tmp_path):
    with serve(Script(behaviour)) as url:
        judge, waits = judge_at(url, tmp_path / "cache", retries=1, timeout_s=0.2 if behaviour == "hang" else 60.0)
        with pytest.raises(JudgeFailure, match=reason):
            judge.right("Q?", ["a"], "x")
        judge.close()
    assert len(waits) == 1
    assert judge.counts.failures == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (403, "refuses the key"), (404, "model name")]
)
def test_a_wrong_key_or_name_stops_at_once(status, message):
    script = Script((status,))
    with serve(script) as url:
        judge, waits = judge_at(url)
        with pytest.raises(ConfigError, match=message):
            judge.right("Q?", ["a"], "x")
        judge.close()
    assert (len(script.asked), waits) == (1, [])


def test_the_budget_counts_every_request():
    with serve(Script((500,), "yes")) as url:
        judge, _ = judge_at(url, budget=2)
        assert judge.right("Q?", ["a"], "x")
        with pytest.raises(BudgetSpentError, match="budget of 2 requests is used up"):
            judge.right("Q?", ["a"], "y")
        assert judge.right("Q?", ["a"], "x")  # from the cache
        judge.close()


def test_nobody_there_is_a_failure():
    with serve(Script("yes")) as url:
        pass
    judge, _ = judge_at(url, retries=0)
    with pytest.raises(JudgeFailure, match="no connection"):
        judge.right("Q?", ["a"], "x")
    judge.close()


def test_addresses_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="must start with http"):
        JudgeSettings("localhost:80", "m")
