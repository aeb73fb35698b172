import threading
from concurrent.futures import ThreadPoolExecutor

from qzoom.cli.label import JudgeOptions
from tests.llm.stub import Stub, serve


def test_as_many_requests_go_to_the_judge_as_asked_for(tmp_path):
    together = threading.Barrier(12)

    def answer(body, before):
        together.wait(60)
        return "yes"

    stub = Stub(answer)
    with serve(stub) as url:
        judge = JudgeOptions(url, "m", judge_parallel=12, judge_retries=0).open(tmp_path)
        with ThreadPoolExecutor(12) as pool:
            assert all(pool.map(lambda number: judge.right(f"Question {number}?", ["a cat"], "the cat"), range(12)))
        judge.close()
    assert stub.most == 12


def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_labelled(here, tmp_path, monkeypatch):
    words = ("label", "hard-cases", "--questions", "documents:0:1", "-o", tmp_path / "x", "--judge-model", "m")
    here(*words).refuses(2, "--judge-model", "--judge-url")
    monkeypatch.setenv("QZOOM_JUDGE_KEY", "sk-\N{HORIZONTAL ELLIPSIS}")
    here(*words, "--judge-url", "http://127.0.0.1:9/v1").refuses(1, "The key in QZOOM_JUDGE_KEY has characters")
    assert not (tmp_path / "x").exists()
