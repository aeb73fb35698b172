import json

from benchmarks.accuracy import main, results_of, settings, table
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.data.benchmarks.registry import open_task
from tests.evaluation.samples import receipt, row, write_split
from tests.tiny_models import engine


def answered(right):
    """Ten questions about each picture; it is right about all of them or none."""
    return [row("33.90" if name in right else "1", picture=name, index=i) for name in "abcd" for i in range(10)]


def test_questions_about_one_picture_are_no_evidence_of_their_own():
    never, auto, always, plain = settings(144, 144)
    measured = {never: answered(""), auto: answered("abc"), always: answered("abcd"), plain: answered("ab")}
    found = results_of(open_task("documents", seed=0, count=1), measured)
    assert [line["exact_match"]["all"] for line in found["lines"]] == [0.0, 0.75, 1.0, 0.5]
    # Two of four pictures are right: draws of pictures reach from none to all, draws of questions from 0.35 to 0.65.
    assert [line["interval_95"] for line in found["lines"]] == [[0.0, 0.0], [0.25, 1.0], [1.0, 1.0], [0.0, 1.0]]
    assert [(pair["difference"], pair["interval"]) for pair in found["pairs"]] == [
        (0.25, [0.0, 0.75]), (0.5, [0.0, 1.0])
    ]  # fmt: skip
    text = table("documents", found)
    assert (
        "auto, ≤ 144 + 144 against never, ≤ 288: +25.0 points (+0.0 to +75.0), right alone 10 against 0 of 40 "
        "questions." in text
    )
    assert "sign test" not in text


def test_tables(tmp_path, capsys):
    model = save_pretrained(engine("qwen3_vl"), tmp_path / "model", include_base=True)
    data = write_split(tmp_path / "data", [receipt("a"), receipt("b", 90, 260)])
    words = ["--data", data, "--model", model, "--pictures", 1, "--coarse-tokens", 8, "--region-tokens", 6]
    words += ["--results", tmp_path / "results", "--raw", tmp_path / "raw", "--device", "cpu", "--max-new-tokens", 2]
    found = main([str(word) for word in words])
    text = (tmp_path / "results" / "accuracy.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert json.loads((tmp_path / "results" / "accuracy.json").read_text(encoding="utf-8")) == found
    assert list(found["results"]) == ["receipts", "documents", "scenes"]
    for name, result in found["results"].items():
        assert f"## {name.capitalize()}" in text
        assert [line["setting"]["zoom"] for line in result["lines"]] == ["never", "auto", "always", "never"]
        assert [pair["first"] for pair in result["pairs"]] == ["auto, <= 8 + 6", "always, <= 8 + 6"]
        assert result["lines"][0]["visual_tokens"] <= 8
        assert all(line["visual_tokens"] <= 14 for line in result["lines"])
        assert all(line["n"] == result["pairs"][0]["questions"] > 0 for line in result["lines"])
        assert result["lines"][0]["zoomed"] == result["lines"][3]["zoomed"] == 0.0
    assert found["results"]["receipts"]["pictures"] == 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()}
    assert len(before) == 12
    assert main([str(word) for word in words]) == found
    assert {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()} == before


def test_a_model_without_a_region_branch_gets_the_plain_lines(tmp_path):
    model = save_pretrained(engine("qwen3_vl", heads=False), tmp_path / "model", include_base=True)
    data = write_split(tmp_path / "data", [receipt("a")])
    words = ["--data", data, "--model", model, "--pictures", 0, "--coarse-tokens", 8, "--region-tokens", 6]
    words += ["--results", tmp_path / "results", "--raw", tmp_path / "raw", "--device", "cpu", "--max-new-tokens", 2]
    found = main([str(word) for word in words])["results"]
    assert list(found) == ["receipts"]
    assert [line["setting"]["name"] for line in found["receipts"]["lines"]] == ["never, <= 8", "never, <= 14"]
    assert found["receipts"]["pairs"] == []
