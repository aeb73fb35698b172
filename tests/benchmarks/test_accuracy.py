import json

import pytest

from benchmarks.accuracy import main, sign_test
from qzoom.checkpoints.adapter import save_pretrained
from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import engine


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (0, 5, 0.0625), (8, 2, 112 / 1024)]
)
def test_sign_test(first, second, p):
    assert sign_test(first, second) == pytest.approx(p)


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
        assert all(line["n"] == result["pairs"][0]["n"] > 0 for line in result["lines"])
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
