import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qzoom import QZoom
from tests.llm.stub import Stub, serve, text_of
from tests.serving.running import data_url, image_part, page, running, user, wait_until

QUESTIONS = ("What is the total amount?", "What is the date?")
NOW = {"Retry-After": "0"}


def question_lines(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{i}", "image": f"p{i % 2}.png", "question": QUESTIONS[i % 3 % 2]} for i in range(count)]


def write_lines(path: Path, lines: list[dict[str, Any]], *raw: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in [*map(json.dumps, lines), *raw]))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(records: list[dict[str, Any]]) -> dict[str, str]:
    return {r["custom_id"]: r["response"]["body"]["choices"][0]["message"]["content"] for r in records}


@pytest.fixture
def folder(tmp_path):
    for i in range(2):
        page(f"TOTAL {i + 3}.55").save(tmp_path / f"p{i}.png")
    return tmp_path


def test_every_kind_of_line_gets_one_line_in_the_order_of_the_input(here, folder):
    asked = [user(image_part(data_url(page("TOTAL 3.55"))), QUESTIONS[0])]
    local = [user(image_part("file://" + str(folder / "p0.png")), QUESTIONS[0])]
    lines = [
        *question_lines(3),
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": asked}},
        {"custom_id": "look", "url": "/v1/perceive", "body": {"messages": asked}},
        {"custom_id": "file", "body": {"messages": local, "max_tokens": 8}},
        {"id": "talk", "image": "p1.png", "turns": [{"question": QUESTIONS[0]}, {"question": QUESTIONS[1]}]},
        {"id": "page", "image": "p0.png", "questions": [{"question": q} for q in QUESTIONS]},
        {"custom_id": "wrong", "body": {"messages": asked, "temperatur": 1}},
        {"custom_id": "other", "body": {"messages": asked, "model": "gpt-9"}},
        {"custom_id": "stream", "body": {"messages": asked, "stream": True}},
        {"custom_id": "edit", "url": "/v1/edits", "body": {}},
        {"id": "gone", "image": "no.png", "question": "?"},
        {"id": "outside", "image": "../x.png", "question": "?"},
    ]
    source = write_lines(folder / "in.jsonl", lines, "{broken", "[1]")
    done = here("batch", source, "-o", folder / "out.jsonl", "--max-tokens", "8")
    assert (done.code, done.out) == (1, f"9 answers and 8 errors in {folder / 'out.jsonl'}\n")
    records = read_lines(folder / "out.jsonl")
    names = [line.get("custom_id", line.get("id")) for line in lines]
    names[names.index("page")] = ["page/1", "page/2"]
    assert [r["custom_id"] for r in records] == [
        n for name in names for n in (name if isinstance(name, list) else [name])
    ] + [None, None]
    by_id = {r["custom_id"]: r for r in records}
    status = {name: (r["response"] or {}).get("status_code") for name, r in by_id.items() if name}
    assert (status["wrong"], status["other"]) == (400, 404)
    assert by_id["look"]["response"]["body"]["object"] == "qzoom.perception"
    answers = texts(
        [r for r in records if (r["response"] or {}).get("status_code") == 200 and r["custom_id"] != "look"]
    )
    assert answers["chat"] == answers["file"] == answers["q0"] == answers["page/1"]
    assert (len(by_id["talk"]["turns"]), by_id["talk"]["turns"][1]) == (2, answers["talk"])
    for name, words in {
        "stream": "no meaning in a batch",
        "edit": "/v1/chat/completions",
        "gone": "'no.png' cannot be read",
        "outside": "--media",
    }.items():
        assert words in by_id[name]["error"]["message"]
    assert [(r["line"], r["error"]["message"].split(":")[0]) for r in records[-2:]] == [
        (15, "Line 15"),
        (16, "Line 16"),
    ]


def test_a_line_that_cannot_be_asked_does_not_end_the_job(here, folder):
    def chat(**body: Any) -> dict[str, Any]:
        return {"messages": [user("TOTAL?")]} | body

    (folder / "lists").mkdir()
    lines: list[dict[str, Any]] = [
        {"custom_id": "nan", "body": chat(temperature=float("nan"))},
        {"custom_id": "half", "body": chat(messages=[user("\ud800")])},
        {"custom_id": "address", "body": chat(messages=[user(image_part("file://[x"))])},
        {"custom_id": "file", "body": chat(messages=[user({"type": "file", "file": {"file_data": "file:///no.pdf"}})])},
        {"id": "page", "image": "../p0.png", "questions": [1]},
        {"id": "talk", "image": "../p0.png", "turns": []},
        {"id": "line 8", "image": "../p0.png", "question": QUESTIONS[0]},
    ]
    source = write_lines(folder / "lists" / "in.jsonl", lines, "{broken")
    output = folder / "out.jsonl"
    words = ("batch", source, "-o", output, "--max-tokens", "2", "--media", folder)
    assert here(*words).out.startswith("1 answers and 7 errors")
    *records, last = read_lines(output)
    faults = [r["error"] or r["response"]["body"].get("error") or {} for r in records]
    for fault, words_of_it in zip(
        faults,
        ("not valid JSON", "not valid JSON", "malformed", "outside", "no 'question'", "no 'question'", ""),
        strict=True,
    ):
        assert words_of_it in fault.get("message", "")
    assert records[-1]["custom_id"] == "line 8"
    assert last["line"] == 8
    before = output.read_bytes()
    here(*words)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((401, {}), "refuses the key"),
        ((502, NOW, b"<html>"), "status 502 and no reply"),
        ((404, {}, b'{"detail": "Not Found"}'), "status 404, as it would to every line"),
        ((404, {}, b'{"error": {"message": "no", "code": "not_found"}}'), "check --server"),
        ((405, {}, b'{"detail": "Method Not Allowed"}'), "status 405"),
        ((403, {}), "--api-key"),
        ((307, {"Location": "https://127.0.0.1/"}, b"{}"), "status 307"),
    ],
)
def test_a_server_that_refuses_everything_ends_the_job(here, folder, answer, sentence):
    source = write_lines(folder / "in.jsonl", question_lines(1))
    with serve(Stub(lambda *_: answer, models=("tiny",))) as url:
        refused = here("batch", source, "-o", folder / "out.jsonl", "--server", url, "--quiet")
    assert refused.is_one_sentence
    assert sentence in refused.err
    assert (folder / "out.jsonl").read_bytes() == b""


OK = b'{"object": "chat.completion", "choices": [{"message": {"content": "A4"}}]}'
TEXTS = [f"Question {i}?" for i in range(4)]


def test_failures_that_may_pass_are_asked_again(here, folder):
    failing = {TEXTS[0]: 504, TEXTS[1]: 500, TEXTS[2]: 400}
    stub = Stub(lambda body, before: (failing[text_of(body)], NOW) if text_of(body) in failing else OK)
    stub.models = ("tiny",)
    lines = [{"custom_id": text, "body": {"messages": [{"role": "user", "content": text}]}} for text in TEXTS]
    source, output = write_lines(folder / "in.jsonl", lines), folder / "out.jsonl"

    def statuses() -> list[tuple[str, int]]:
        return [(record["custom_id"], record["response"]["status_code"]) for record in read_lines(output)]

    with serve(stub) as url:
        words = ("batch", source, "-o", output, "--server", url, "--concurrency", "1")
        first = here(*words)
        assert (first.code, first.out) == (1, f"1 answers and 3 errors in {output}\n")
        assert "2 of the errors may pass; the same command asks these lines again" in first.err
        assert statuses() == list(zip(TEXTS, (504, 500, 400, 200), strict=True))
        assert Counter(map(text_of, stub.bodies)) == dict(zip(TEXTS, (3, 3, 1, 1), strict=True))
        failing.pop(TEXTS[0])
        stub.bodies.clear()
        second = here(*words)
        assert "2 answered before" in second.err
        assert second.out == f"2 answers and 2 errors in {output}\n"
        assert statuses() == list(zip(TEXTS, (200, 500, 400, 200), strict=True))
        assert Counter(map(text_of, stub.bodies)) == dict(zip(TEXTS[:2], (1, 3), strict=True))


def test_a_failure_that_passes_at_once_is_no_error(here, folder):
    stub = Stub(lambda body, before: OK if before == 2 else (504, NOW), models=("tiny",))
    source = write_lines(folder / "in.jsonl", question_lines(1))
    with serve(stub) as url:
        done = here("batch", source, "-o", folder / "out.jsonl", "--server", url)
    assert (done.code, texts(read_lines(folder / "out.jsonl"))) == (0, {"q0": "A4"})
    assert list(stub.asked.values()) == [3]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_asks_nothing_twice(here, folder):
    source = write_lines(folder / "in.jsonl", question_lines(24))
    command = [sys.executable, "-m", "qzoom", "batch", source, "-o", folder / "out.jsonl", "--max-tokens", "8"]
    child = subprocess.Popen([*command, "--concurrency", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    output = folder / "out.jsonl"
    wait_until(lambda: child.poll() is not None or (output.exists() and output.read_bytes().count(b"\n") >= 2))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = {
        r["custom_id"]: r["response"]["request_id"] for r in map(json.loads, output.read_bytes().split(b"\n")[:2])
    }
    with output.open("ab") as file:
        file.write(b'{"id": "torn')
    assert here("batch", source, "-o", output, "--max-tokens", "8", "--quiet").code == 0
    records = read_lines(output)
    assert [r["custom_id"] for r in records] == [f"q{i}" for i in range(24)]
    requests = {r["custom_id"]: r["response"]["request_id"] for r in records}
    assert requests.items() >= before.items()
    assert here("batch", source, "-o", folder / "whole.jsonl", "--max-tokens", "8", "--quiet").code == 0
    assert texts(records) == texts(read_lines(folder / "whole.jsonl"))


def test_another_jobs_output_is_left_alone(here, folder):
    source = write_lines(folder / "in.jsonl", question_lines(1))
    output = folder / "out.jsonl"
    assert here("batch", source, "-o", output, "--max-tokens", "4").code == 0
    kept = output.read_bytes()
    for words, sentence in (
        (("--max-tokens", "5"), "request.max_tokens was 4, is 5"),
        (("--max-tokens", "4", "--zoom", "never"), "request.qzoom was None"),
    ):
        here("batch", source, "-o", output, *words).refuses(1, sentence)
    kept_away = output.rename(folder / "kept.jsonl")
    assert here("batch", source, "-o", output, "--max-tokens", "5").code == 0  # nothing of the other job is left
    (folder / "out.jsonl.batch.json").unlink()
    kept_away.rename(output)
    assert "is missing or damaged" in here("batch", source, "-o", output, "--max-tokens", "4").err
    assert here("batch", source, "-o", output, "--max-tokens", "4", "--fresh").code == 0
    kept = output.read_bytes()
    write_lines(source, question_lines(2))
    assert "input was" in here("batch", source, "-o", output, "--max-tokens", "4").err
    assert output.read_bytes() == kept
    (folder / "mine.jsonl").write_text("notes\n")
    refused = here("batch", source, "-o", folder / "mine.jsonl")
    assert refused.is_one_sentence
    assert "no batch output" in refused.err
    assert (folder / "mine.jsonl").read_text() == "notes\n"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xff\xd8\xff\xe0 no\ntext\n", "not JSON"),
        ('{"id": "a"}\n'.encode("utf-16"), "not JSON"),
        (b"id,image,question\na,p0.png,?\n", "not JSON"),
        (b'[{"id": "a", "image": "p0.png", "question": "?"}]\n', "not a JSON object"),
        (b'\n{"image": "p0.png", "question": "?"}\n', "no 'custom_id'"),
    ],
)
def test_another_kind_of_file_is_refused_as_a_whole(here, folder, data, sentence):
    (folder / "in.jsonl").write_bytes(data)
    refused = here("batch", folder / "in.jsonl", "-o", folder / "out.jsonl")
    refused.refuses(1, "in.jsonl is no file of questions; its first line:", sentence)


@pytest.mark.parametrize(
    ("lines", "words", "code", "sentence"),
    [
        ([{"id": "a", "image": "p0.png", "question": "?"}] * 2, (), 1, "line 2: the id 'a' is already on line 1"),
        ([], (), 1, "holds no questions"),
        ([], ("-o", "out.txt"), 2, "must end in .jsonl or .parquet"),
        ([{"id": "a", "image": "p0.png", "question": "?"}], ("--server", "http://127.0.0.1:9"), 1, "does not answer"),
        ([{"id": "a", "image": "p0.png", "question": "?"}], ("--server", "127.0.0.1:9"), 2, "write http://HOST:PORT"),
    ],
)
def test_what_cannot_run_is_one_sentence(here, folder, monkeypatch, lines, words, code, sentence):
    monkeypatch.setattr("qzoom.serving.batch_run._RETRIES", 0)
    source = write_lines(folder / "in.jsonl", lines)
    done = here("batch", source, "--quiet", *(words if "-o" in words else ("-o", folder / "out.jsonl", *words)))
    assert done.code == code
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_parquet_in_and_out(here, folder):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = (folder / "p0.png").read_bytes()
    rows = [
        {"id": "a", "image": {"bytes": data, "path": None}, "question": QUESTIONS[0]},
        {"id": "b", "image": {"bytes": None, "path": "p0.png"}, "question": QUESTIONS[0]},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    output = folder / "answers" / "out.parquet"  # paths start from the input all the same
    done = here("batch", folder / "in.parquet", "-o", output, "--max-tokens", "8", "--quiet")
    assert done.code == 0, done.err
    table = parquet.read_table(output).to_pylist()
    assert [row["custom_id"] for row in table] == ["a", "b"]
    assert (table[0]["text"], table[0]["status"]) == (table[1]["text"], 200)
    assert json.loads(table[0]["record"])["response"]["body"]["usage"]["completion_tokens"] > 0
    parquet.write_table(pa.Table.from_pylist([{"x": 1}]), folder / "bad.parquet")
    assert "a batch needs custom_id and body" in here("batch", folder / "bad.parquet", "-o", folder / "o.jsonl").err


@pytest.mark.slow
def test_ray_answers_the_same(here, folder):
    pytest.importorskip("ray")
    source = write_lines(folder / "in.jsonl", question_lines(4), "{broken")
    words = ("--max-tokens", "8", "--quiet")
    assert here("batch", source, "-o", folder / "here.jsonl", *words).code == 1
    done = here("batch", source, "-o", folder / "ray.jsonl", *words, "--actors", "1")
    assert done.out.startswith("4 answers and 1 errors"), done.err
    expected, records = read_lines(folder / "here.jsonl"), read_lines(folder / "ray.jsonl")
    assert texts(records[:4]) == texts(expected[:4])
    assert records[4] == expected[4]


def test_a_picture_that_is_none_is_the_servers_refusal(here, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    Image.new("L", (4, 4)).save(folder / "p9.png")
    source = write_lines(folder / "in.jsonl", [{"id": "a", "image": "bad.png", "question": "?"}])
    assert here("batch", source, "-o", folder / "out.jsonl").code == 1
    response = read_lines(folder / "out.jsonl")[0]["response"]
    assert response["status_code"] == 400
    assert "picture 1" in response["body"]["error"]["message"].lower()


def test_an_input_that_goes_away_stops_the_run(here, folder):
    lines = [{"custom_id": text, "body": {"messages": [{"role": "user", "content": text}]}} for text in TEXTS]
    source, output = write_lines(folder / "in.jsonl", lines), folder / "out.jsonl"
    changes = [lambda: source.rename(folder / "kept.jsonl"), lambda: write_lines(source, lines[::-1])]

    def answer(body: dict[str, Any], before: int) -> bytes:
        if changes:
            changes.pop(0)()
        return OK

    with serve(Stub(answer)) as url:
        words = ("batch", source, "-o", output, "--server", url, "--model", "tiny", "--concurrency", "1", "--quiet")
        here(*words).refuses(1, "in.jsonl cannot be read any more", "run the same command again")
        (folder / "kept.jsonl").rename(source)
        here(*words).refuses(1, "in.jsonl was changed during the run (line 3 is another)")
        assert list(texts(read_lines(output))) == TEXTS[:2]
        write_lines(source, lines)
        assert here(*words).out == f"4 answers and 0 errors in {output}\n"


def test_two_runs_of_one_parquet_job(here, folder):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": text, "image": "p0.png", "question": text} for text in TEXTS]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "in.parquet")
    words = ["batch", folder / "in.parquet", "-o", folder / "out.parquet", "--concurrency", "1", "--model", "tiny"]
    second: list[subprocess.CompletedProcess[str]] = []

    def answer(body: dict[str, Any], before: int) -> bytes:
        if not second:
            command = [sys.executable, "-m", "qzoom", *map(str, words), "--fresh"]
            second.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return OK

    with serve(Stub(answer)) as url:
        words += ["--server", url]
        assert here(*words).out == f"4 answers and 0 errors in {folder / 'out.parquet'}\n"
    assert (second[0].returncode, second[0].stderr.count("\n")) == (1, 1)
    assert "Another process is writing" in second[0].stderr


def test_unknown_fields_of_questions_are_refused_by_line(here, folder):
    known = {"answer": ["x"], "boxes": [[0, 0, 1, 1]]}
    base = {"image": "p0.png", "question": QUESTIONS[0]}
    picture = {"image": "p0.png", "width": 320, "height": 400}
    lines = [
        base | known | {"id": "good", "mode": "text", "source": "mine"},
        {"id": "talk", "image": "p0.png", "turns": [known | {"question": QUESTIONS[0]}]},
        picture | {"id": "page", "questions": [known | {"field": "a", "question": QUESTIONS[0], "negative": False}]},
        base | {"id": "typo", "max_token": 1},
        base | {"id": "both", "turns": [{"question": QUESTIONS[0]}]},
        {"id": "turn", "image": "p0.png", "turns": [{"question": QUESTIONS[0]}, {"question": "?", "zoom": "never"}]},
        picture | {"id": "part", "questions": [{"question": QUESTIONS[0], "feild": "a"}]},
        picture | {"id": "mixed", "questions": [{"question": QUESTIONS[0]}], "qestion": "?"},
    ]
    source, output = write_lines(folder / "in.jsonl", lines), folder / "out.jsonl"
    assert here("batch", source, "-o", output, "--max-tokens", "2").out.startswith("3 answers and 5 errors")
    faults = {record["custom_id"]: record["error"] and record["error"]["message"] for record in read_lines(output)}
    for name, sentence in {
        "typo": "Line 4: unknown field 'max_token'; known keys: id, image, question,",
        "both": "Line 5: both 'question' and 'turns'",
        "turn": "Line 6: turn 2: unknown field 'zoom'; known keys: question, answer, boxes.",
        "part/1": "Line 7: question 1: unknown field 'feild'; did you mean 'field'?",
        "mixed/1": "Line 8: unknown field 'qestion'; did you mean 'questions'?",
    }.items():
        assert sentence in faults.pop(name)
    assert faults == {"good": None, "talk": None, "page/1": None}


def test_the_servers_model_is_asked(here, folder, monkeypatch):
    source, output = write_lines(folder / "in.jsonl", question_lines(1)), folder / "out.jsonl"
    with running(QZoom.from_pretrained("tiny"), model_name="big") as site:
        words = ("batch", source, "-o", output, "--server", site.url, "--max-tokens", "2", "--quiet")
        here(*words, "--model", "tiny").refuses(2, "has big and not 'tiny'; leave --model (QZOOM_MODEL) out")
        monkeypatch.setenv("QZOOM_MODEL", "tiny")
        here(*words).refuses(2, "has big and not 'tiny'")
        assert not output.exists()
        monkeypatch.delenv("QZOOM_MODEL")
        assert here(*words).code == here(*words, "--model", "big").code == 0
        wrong = ("batch", source, "-o", folder / "b.jsonl", "--server", f"{site.url}/no", "--model", "big", "--quiet")
        here(*wrong).refuses(1, "status 404, as it would to every line")
    assert read_lines(output)[0]["response"]["body"]["model"] == "big"
    with running(QZoom.from_pretrained("tiny"), model_name="other") as site:
        other = ("batch", source, "-o", output, "--server", site.url, "--max-tokens", "2")
        here(*other).refuses(1, "holds answers of another job", "model.model was 'big', is 'other'")


@pytest.mark.parametrize(
    ("models", "status", "sentence"),
    [((), 200, "does not list its models"), ((), 404, "does not list its models"), (("a", "b"), 200, "has a, b")],
)
def test_a_server_without_one_model_needs_a_name(here, folder, models, status, sentence):
    source, output = write_lines(folder / "in.jsonl", question_lines(1)), folder / "out.jsonl"
    stub = Stub(lambda *_: OK, models_status=status, models=models)
    with serve(stub) as url:
        words = ("batch", source, "-o", output, "--server", url, "--quiet")
        here(*words).refuses(2, sentence, "name the one to ask")
        assert stub.bodies == []
        assert here(*words, "--model", "b").code == 0
    assert [body["model"] for body in stub.bodies] == ["b"]


def test_a_model_that_only_a_line_names_is_that_lines_error(here, folder):
    def answer(body: dict[str, Any], before: int) -> Any:
        missing = b'{"error": {"message": "no such model", "code": "model_not_found"}}'
        return OK if body["model"] == "tiny" else (404, {}, missing)

    bodies = [{"messages": [], "model": name} for name in ("gpt-9", "tiny")]
    lines = [{"custom_id": body["model"], "body": body} for body in bodies]
    source, output = write_lines(folder / "in.jsonl", lines), folder / "out.jsonl"
    with serve(Stub(answer, models=("tiny",))) as url:
        done = here("batch", source, "-o", output, "--server", url, "--json")
    assert (done.code, json.loads(done.out)) == (
        1,
        {"questions": 2, "answers": 1, "errors": 1, "passing": 0, "output": str(output)},
    )


def test_who_answers_belongs_to_the_job(here, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "tiny").mkdir()  # no part of the embedded model
    source, output = write_lines(folder / "in.jsonl", question_lines(1)), folder / "out.jsonl"
    words = ("batch", source, "-o", output, "--max-tokens", "2")
    assert here(*words).code == 0
    (folder / "tiny" / "x").write_text("x")
    assert "1 answered before" in here(*words).err
    answer = ("--answer-url", "http://127.0.0.1:9/v1", "--answer-model", "m")
    for more, change in (
        (("--quantization", "4bit"), "engine.quantization was None, is '4bit'"),
        (("--engine", "vllm", "--engine-option", "max_model_len=9"), "engine.name was 'native', is 'vllm'"),
        (("--engine", "vllm", "--engine-option", "max_model_len=9"), "engine.options.max_model_len was None, is 9"),
        (answer, "engine.answer_model was None, is 'm'"),
    ):
        here(*words, *more).refuses(1, "holds answers of another job", change)
    with serve(Stub(lambda *_: OK, models=("tiny",))) as url:
        here(*words, "--server", url).refuses(1, "engine.name was 'native', is 'server'")
    about = folder / "out.jsonl.batch.json"
    job = json.loads(about.read_text())
    del job["engine"]  # as earlier versions wrote it
    job["model"]["files"] = "0" * 16
    about.write_text(json.dumps(job))
    assert "1 answered before" in here(*words).err
    here(*words, "--dtype", "bfloat16").refuses(1, "model.dtype was 'auto', is 'bfloat16'")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--server", "http://127.0.0.1:9", "--actors", "3"), "the server of --server answers"),
        (("--server", "http://127.0.0.1:9", "--engine-option", "a=1"), "--engine-option"),
        (("--server", "http://127.0.0.1:9", "--dtype", "float32"), "--dtype"),
        (("--actors", "3", "--engine-option", "a=1"), "only --engine vllm takes them"),
        (("--server", "http://127.0.0.1:9", "--api-key", "sk-\u2026"), "printable ASCII without spaces"),
    ],
)
def test_options_in_vain_are_wrong_calls(here, folder, words, sentence):
    source = write_lines(folder / "in.jsonl", question_lines(1))
    here("batch", source, "-o", folder / "out.jsonl", *words).refuses(2, sentence)
    assert not (folder / "out.jsonl").exists()


def test_a_key_that_no_header_carries(here, folder, monkeypatch):
    monkeypatch.setenv("QZOOM_ANSWER_KEY", "sk-\u2026")
    source = write_lines(folder / "in.jsonl", question_lines(1))
    answer = ("--answer-url", "http://127.0.0.1:9/v1", "--answer-model", "m", "--quiet")
    here("batch", source, "-o", folder / "out.jsonl", *answer).refuses(1, "The key in QZOOM_ANSWER_KEY has")
