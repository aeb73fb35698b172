import json
from pathlib import Path

import pytest

from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import picture

KEYS = {
    *("n", "exact_match", "anls", "zoomed", "hit_rate", "box_area", "visual_tokens"),
    *("seconds", "seconds_total", "errors", "zoom", "model"),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("data"), [receipt("a"), receipt("b", 90, 260), receipt("c", 300, 150)])


@pytest.fixture
def evaluate(here, checkpoint):
    """Run `qzoom eval` with short answers by the random model."""

    def call(*words, model=checkpoint):
        return here("eval", *words, "--model", model, "--device", "cpu", "--max-new-tokens", "3")

    return call


def figures(result):
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    values = json.loads(result.out)
    assert values.keys() >= KEYS
    shares = [values["anls"], values["zoomed"], values["hit_rate"], values["box_area"], *values["exact_match"].values()]
    assert all(share is None or 0 <= share <= 1 for share in shares)
    return values


@pytest.mark.parametrize("zoom", ["never", "auto", "always"])
def test_one_line_of_figures(evaluate, data, zoom):
    found = figures(
        evaluate("receipts", "--data", data, "--split", "dev", "--zoom", zoom, "--max-visual-tokens", "24", "--json")
    )
    assert found["n"] == 9
    assert list(found["exact_match"]) == ["total", "date", "company", "all"]
    assert (found["task"], found["split"], found["zoom"], found["errors"]) == ("receipts", "dev", zoom, 0)
    assert 0 < found["visual_tokens"] <= 24
    assert found["seconds_total"] == pytest.approx(9 * found["seconds"], rel=1e-3)
    if zoom == "never":
        assert (found["coarse_tokens"], found["region_tokens"]) == ([4, 24], None)
        assert (found["zoomed"], found["hit_rate"], found["box_area"]) == (0.0, None, None)
    else:
        assert (found["coarse_tokens"], found["region_tokens"]) == ([4, 12], [4, 12])
        assert found["zoomed"] > 0
        assert found["box_area"] > 0


def test_limit_and_stated_looks(evaluate, data):
    found = figures(
        evaluate("receipts", "--data", data, "--limit", 2, "--coarse-tokens", 10, "--region-tokens", "4:8", "--json")
    )
    assert found["n"] == 6
    assert (found["coarse_tokens"], found["region_tokens"]) == ([4, 10], [4, 8])


def test_lines_for_people(evaluate, data):
    result = evaluate("receipts", "--data", data, "--limit", 1, "--zoom", "always", "--region-threshold", 0)
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["questions", "exact match", "ANLS", "zoomed", "regions", "cost"]
    assert lines[0].split() == ["questions", "3"]
    assert "zoomed         100.0%" in lines


def test_output_continues(evaluate, data, tmp_path):
    output = tmp_path / "kept" / "run.jsonl"
    words = ("receipts", "--data", data, "--json", "--max-visual-tokens", "24", "--output", output)
    first = figures(evaluate(*words, "--limit", 1))
    lines = output.read_text(encoding="utf-8").splitlines()
    assert (first["n"], len(lines)) == (3, 2)
    assert json.loads(lines[1])["items"][0]["answer"] == "33.90"
    whole = figures(evaluate(*words))
    assert whole["n"] == 9
    assert output.read_text(encoding="utf-8").splitlines()[:2] == lines
    assert figures(evaluate(*words)) == whole
    evaluate(*words, "--zoom", "never").refuses(1, "zoom was 'auto', is 'never'")
    assert figures(evaluate(*words, "--zoom", "never", "--fresh"))["zoomed"] == 0.0


def test_several_tasks_and_scoring_again(evaluate, here, data, tmp_path):
    output = tmp_path / "runs"
    words = ("receipts", "scenes", "--data", data, "--count", 1, "--limit", 1, "--max-visual-tokens", 24)
    result = evaluate(*words, "-o", output, "--batch-size", 4, "--json")
    assert result.code == 0, result.err
    asked = [json.loads(line) for line in result.out.splitlines()]
    assert [values["task"] for values in asked] == ["receipts", "scenes"]
    assert sorted(path.name for path in output.iterdir()) == ["receipts.jsonl", "scenes.jsonl"]
    again = here("eval", "--rescore", output, "--json")
    assert again.code == 0, again.err
    for first, second in zip(asked, map(json.loads, again.out.splitlines()), strict=True):
        for key in ("n", "exact_match", "strict", "harness", "metric", "anls", "hit_rate", "seconds", "task"):
            assert second[key] == first[key]
    lines = (output / "receipts.jsonl").read_text(encoding="utf-8").splitlines()
    about = json.loads(lines[0])["settings"]["model"]
    assert (about["dtype"], about["attention"]) == ("float32", "sdpa")
    row = json.loads(lines[1])["items"][0]
    assert row["coarse_size_px"][0] % 32 == 0
    assert row["question"] in row["prompt"]


def test_other_answers_are_scored_anew(evaluate, here, data, tmp_path):
    output = tmp_path / "run.jsonl"
    words = ("receipts", "--data", data, "--limit", 1, "--zoom", "never", "--max-visual-tokens", 24)
    assert figures(evaluate(*words, "--output", output, "--json"))["exact_match"]["total"] == 0.0
    lines = output.read_text(encoding="utf-8").splitlines()
    group = json.loads(lines[1])
    group["items"][0]["prediction"] = "RM 33.90"
    output.write_text("\n".join([lines[0], json.dumps(group), *lines[2:]]) + "\n", encoding="utf-8")
    again = json.loads(here("eval", "--rescore", output, "--json").out)
    assert again["exact_match"] == {"total": 1.0, "date": 0.0, "company": 0.0, "all": pytest.approx(1 / 3)}
    wrong = (("none.jsonl", None, "no such file or folder"), ("notes.jsonl", "hello\n", "does not start"))
    for name, text, said in wrong:
        if text:
            (tmp_path / name).write_text(text, encoding="utf-8")
        here("eval", "--rescore", tmp_path / name).refuses(1, said)


def test_baselines_and_seeds_have_figures(evaluate, data, tmp_path):
    words = ("receipts", "--data", data, "--limit", 1, "--max-visual-tokens", 24, "--temperature", 2, "--seeds", 2)
    result = evaluate(*words, "-o", tmp_path / "runs", "--json")
    assert result.code == 0, result.err
    first, second, both = map(json.loads, result.out.splitlines())
    assert (first["draw"], second["draw"]) == (0, 1)
    assert both["seeds"] == 2
    assert both["strict_mean"] == pytest.approx((first["strict"]["all"] + second["strict"]["all"]) / 2)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["receipts-seed0.jsonl", "receipts-seed1.jsonl"]
    found = figures(
        evaluate("receipts", "--data", data, "--limit", 1, "--method", "centre", "--max-visual-tokens", 24, "--json")
    )
    assert (found["method"], found["zoomed"], found["coarse_tokens"]) == ("centre", 1.0, [4, 12])


def test_a_benchmark_from_a_folder(evaluate, tmp_path):
    picture(0, 120, 80).save(tmp_path / "one.png")
    row = {"image": "one.png", "question": "Which year?", "answer": "1999", "type": "human_test"}
    lines = [json.dumps(row), json.dumps(row | {"image": "gone.png"})]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = evaluate("chartqa", "--data", tmp_path, "--json")
    found = figures(result)
    assert (found["n"], found["errors"], found["metric"]) == (2, 1, "relaxed_accuracy")
    assert list(found["strict"]) == ["human", "augmented", "all"]
    assert "gone.png" in result.err
    assert "1 of 2 questions failed and count as wrong" in result.err


WRONG_CALLS = {
    "no task": ((), "TASK"),
    "one unknown of two": (("scenes", "documnts"), "did you mean 'documents'"),
    "unknown method": (("scenes", "--method", "guess"), "known methods: qzoom"),
    "revision for seeds": (("scenes", "--data-revision", "main"), "--data-revision has no meaning"),
    "seeds without draws": (("scenes", "--seeds", "2"), "--temperature"),
    "drawn by a baseline": (("scenes", "--method", "centre", "--temperature", "1"), "greedily"),
    "one file for two": (("scenes", "documents", "--output", "both.jsonl"), "name a folder"),
    "tasks to rescore": (("scenes", "--rescore", "runs"), "leave the tasks out"),
    "limit to rescore": (("--rescore", "runs", "--limit", "3"), "leave --limit out"),
    "data to rescore": (("--rescore", "runs", "--data", "."), "leave --data out"),
    "output to rescore": (("--rescore", "runs", "--output", "x"), "leave --output out"),
    "fresh to rescore": (("--rescore", "runs", "--fresh"), "leave --fresh out"),
    "revision for receipts": (("receipts", "--data", ".", "--data-revision", "a"), "--data-revision has no meaning"),
    "unknown task": (("recipts", "--data", "."), "did you mean 'receipts'"),
    "no folder": (("receipts",), "--data"),
    "folder for seeds": (("scenes", "--data", "."), "--data has no meaning"),
    "split for seeds": (("documents", "--split", "dev"), "--split has no meaning"),
    "seeds for files": (("receipts", "--data", ".", "--seed", "3"), "--seed has no meaning"),
    "count for files": (("receipts", "--data", ".", "--count", "3"), "--count has no meaning"),
    "seed outside": (("scenes", "--seed", "999999", "--count", "2"), "lies outside"),
    "negative limit": (("scenes", "--limit", "-1"), "--limit"),
    "no tokens": (("scenes", "--max-visual-tokens", "0"), "--max-visual-tokens"),
    "a table": (("scenes", "--output", "one.txt"), "does not end in .jsonl"),
    "tables": (("scenes", "documents", "-o", "new/one.json"), "does not end in .jsonl"),
    "a file": (("scenes", "--output", __file__), "is no folder"),
    "one token to share": (("scenes", "--count", "1", "--max-visual-tokens", "1"), "at least 2 to share"),
    "fresh alone": (("scenes", "--fresh"), "--output"),
    "unknown zoom": (("scenes", "--zoom", "often"), "often"),
}


@pytest.mark.parametrize("kind", WRONG_CALLS)
def test_wrong_calls(evaluate, kind):
    words, said = WRONG_CALLS[kind]
    evaluate(*words).refuses(2, said)
    assert not any(Path(name).exists() for name in ("one.txt", "new"))


def test_bad_data(evaluate, data, tmp_path):
    write_split(tmp_path, [receipt("a"), "{oops"])
    for words, said, code in (
        (("receipts", "--data", tmp_path), "dev.jsonl, line 2: not JSON", 1),
        (("receipts", "--data", data, "--split", "test"), "splits there: dev", 1),
        (("receipts", "--data", data / "nowhere"), "no such question file", 1),
        (("receipts", "--data", data, "--output", tmp_path / "dev.jsonl"), "--fresh", 1),
        (("receipts", "--data", data, "--max-visual-tokens", 10, "--coarse-tokens", 10), "contradict", 2),
        (("receipts", "--data", data, "--preset", "document"), "No preset", 2),
    ):
        evaluate(*words).refuses(code, said)


def test_zooming_without_a_region_branch(evaluate, data, headless):
    evaluate("receipts", "--data", data, "--zoom", "always", model=headless).refuses(1, "no region branch")
    words = ("receipts", "--data", data, "--limit", 1, "--max-visual-tokens", 20, "--json")
    never, auto = evaluate(*words, "--zoom", "never", model=headless), evaluate(*words, model=headless)
    assert "no region branch, so it is measured with --zoom never" in auto.err
    one, two = ({k: v for k, v in figures(r).items() if "second" not in k} for r in (never, auto))
    assert one == two
    assert one["n"] == 3
