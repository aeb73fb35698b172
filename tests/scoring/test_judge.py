import json

import pytest

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


def judge_at(url, **calls):
    endpoint = EndpointSettings(url, "m", "QZOOM_JUDGE_KEY")
    return open_judge(endpoint, CallSettings(**{"backoff_s": 0.001, **calls}))


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


def test_an_unclear_reply_is_asked_for_again():
    stub = Stub(in_turn("perhaps", "yes"))
    with serve(stub) as url:
        judge = judge_at(url)
        assert judge.right("Q?", ["a"], "x")
        judge.close()
    assert len(stub.bodies) == 2
    assert judge.reasons == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("maybe", "neither yes nor no: 'maybe'"), (b"<html>", "no chat completion"), ((500, {}), "HTTP 500"),
        ("drop", "no connection"),
    ],
)  # fmt: skip
def test_failures_that_stay_are_counted_and_no_votes(behaviour, reason):
    with serve(Stub(in_turn(behaviour))) as url:
        judge = judge_at(url, retries=1)
        for _ in range(4):  # a judge that is down never ends the run
            with pytest.raises(JudgeFailure, match=reason):
                judge.right("Q?", ["a"], "x")
        judge.close()
    assert len(judge.reasons) == 4
