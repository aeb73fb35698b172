import json
import time

import pytest

from qzoom.errors import BudgetSpentError, ConfigError, EndpointError
from qzoom.llm.settings import CallSettings, EndpointSettings
from qzoom.scoring.judge import JudgeFailure, open_judge, yes_or_no
from tests.llm.stub import Stub, in_turn, serve

REPLIES = {
    True: ["Yes.", "<think>no, no</think> yes", "Both say a dozen: <answer>yes</answer>"],
    False: ["**NO**", "\\boxed{no}"],
    None: ["yes and no", "maybe", ""],
}  # fmt: skip


@pytest.mark.parametrize("verdict", REPLIES)
def test_verdicts_are_read(verdict):
    for reply in REPLIES[verdict]:
        assert yes_or_no(reply) is verdict


def judge_at(url, cache=None, timeout_s=60.0, **calls):
    endpoint = EndpointSettings(url, "m", "QZOOM_JUDGE_KEY", timeout_s)
    return open_judge(endpoint, CallSettings(**{"backoff_s": 0.001, **calls}), cache)


def test_asks_what_it_should_and_reads_yes_and_no(monkeypatch):
    monkeypatch.setenv("QZOOM_JUDGE_KEY", "secret")
    stub = Stub(in_turn("Yes.", "no", "**YES**"))
    with serve(stub) as url:
        judge = judge_at(url)
        assert [judge.right("Q?", ["a"], text) for text in ("x", "y", "z")] == [True, False, True]
        judge.close()
    assert stub.bodies[0]["model"] == "m"
    assert stub.bodies[0]["temperature"] == 0
    facts = json.loads(stub.bodies[0]["messages"][-1]["content"])
    assert facts == {"question": "Q?", "right_answers": ["a"], "given_answer": "x"}
    assert stub.headers[0]["authorization"] == "Bearer secret"


def test_nothing_is_asked_twice_even_by_another_run(tmp_path):
    stub = Stub(in_turn("yes"))
    with serve(stub) as url:
        for predictions in (("x", "x"), ("x", "new"), ("new",)):
            judge = judge_at(url, tmp_path / "calls.sqlite")
            assert all(judge.right("Q?", ["a"], text) for text in predictions)
            judge.close()
    assert len(stub.bodies) == 2


def test_transient_failures_are_retried():
    stub = Stub(in_turn((429, {"Retry-After": "1"}), (500, {}), "drop", b"nonsense", "perhaps", "yes"))
    with serve(stub) as url:
        judge = judge_at(url, retries=5)
        start = time.monotonic()
        assert judge.right("Q?", ["a"], "x")
        judge.close()
    assert 1 <= time.monotonic() - start < 30
    assert len(stub.bodies) == 6
    assert judge.reasons == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("maybe", "neither yes nor no: 'maybe'"), ("yes and no", "neither yes nor no"),
        (b"<html>", "no chat completion"), (b'{"choices": []}', "no chat completion"), ((500, {}), "HTTP 500"),
        ((429, {}), "HTTP 429"), ("drop", "no connection"), ("hang", "no full reply within 0.2 s"),
    ],
)  # fmt: skip
def test_failures_that_stay_are_counted_and_no_votes(behaviour, reason):
    with serve(Stub(in_turn(behaviour))) as url:
        judge = judge_at(url, retries=1, timeout_s=0.2 if behaviour == "hang" else 60.0)
        for _ in range(4):  # a judge that is down never ends the run
            with pytest.raises(JudgeFailure, match=reason):
                judge.right("Q?", ["a"], "x")
        judge.close()
    assert len(judge.reasons) == 4


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the key .*the key in QZOOM_JUDGE_KEY"), (403, "refuses the key"), (404, "does not know the model")],
)
def test_a_wrong_key_or_name_stops_at_once(status, message):
    stub = Stub(in_turn((status, {})))
    with serve(stub) as url:
        judge = judge_at(url)
        with pytest.raises(EndpointError, match=message) as failure:
            judge.right("Q?", ["a"], "x")
        judge.close()
    assert f"The judge 'm' at {url}" in str(failure.value)
    assert len(stub.bodies) == 1


def test_the_budget_counts_every_request():
    with serve(Stub(in_turn((500, {}), "yes"))) as url:
        judge = judge_at(url, budget_requests=2)
        assert judge.right("Q?", ["a"], "x")
        with pytest.raises(BudgetSpentError, match="budget of 2 requests is used up"):
            judge.right("Q?", ["a"], "y")
        assert judge.right("Q?", ["a"], "x")  # from the cache
        judge.close()


def test_nobody_there_is_a_failure():
    with serve(Stub(in_turn("yes"))) as url:
        pass
    judge = judge_at(url, retries=0)
    with pytest.raises(JudgeFailure, match="no connection"):
        judge.right("Q?", ["a"], "x")
    judge.close()


def test_addresses_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="must start with http"):
        EndpointSettings("localhost:80", "m")
