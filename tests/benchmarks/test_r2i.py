import json

import pytest

from benchmarks.r2i import main
from benchmarks.r2i_words import attention_rows, budget_rows, data_words, gap_rows, verdict
from qzoom.checkpoints.adapter import save_pretrained
from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import engine


def pair(this, other, low, high):
    return {"n": 50, "this": this, "other": other, "difference": this - other, "interval": [low, high]}


def test_the_words():
    gap = pair(0.2, 0.4, -0.3, -0.1) | {"closed": 0.5}
    found = {"difference": {"full": pair(0.5, 0.25, 0.2, 0.3), "gap": gap, "zoom": pair(0.6, 0.5, 0.0, 0.2)}}
    assert gap_rows(found)[1] == ["whole picture", "50", "25.0", "50.0", "+25.0", "+20.0 to +30.0"]
    assert [row[0] for row in gap_rows(found)[1:]] == ["whole picture", "zooming", "gap (region less whole)"]
    assert verdict(found) == (
        "The gap went from 40.0 to 20.0 points: 50.0 % of it is closed (a third was the goal); the interval of the "
        "change excludes zero.\n"
    )
    data = {"pictures": 1000, "negatives": 7, "rows": {"train": 20, "validation": 1}, "known": {}}
    data["steps"] = {"answer": {"entered": 50}, "vote": {"kept": 14}}
    assert data_words({}) == []
    assert data_words(data) == [
        "The student learned from 1,000 pictures: 50 questions about crops were answered, 14 answers agreed on, 21 "
        "rows exported, 7 of them about absent things.\n"
    ]
    assert "| ocr | 4 | 75.0 |" in data_words(data | {"known": {"ocr": {"agreed": 4, "right": 3}}})[1]
    lift, hit = (
        {"this": 30.5, "other": 20.25} | {"difference": 10.25, "interval": [-1.0, 20.0]},
        pair(0.5, 0.25, 0.1, 0.4),
    )
    attention = {"n": 60, "layer_lift": lift, "layer_hit": hit, "head_lift": lift, "head_hit": hit}
    assert attention_rows(attention)[:3] == [
        ["attention", "questions", "base", "student", "difference", "95 %"],
        ["lift, layer", "60", "20.25", "30.50", "+10.25", "-1.00 to +20.00"],
        ["pointing, layer", "60", "25.0", "50.0", "+25.0", "+10.0 to +40.0"],
    ]
    assert budget_rows({288: found})[1] == ["288", "25.0", "50.0", "50.0", "60.0", "+20.0 to +30.0", "+0.0 to +20.0"]


@pytest.mark.slow
def test_both_models_on_receipts(tmp_path):
    names = [str(save_pretrained(engine("qwen3_vl"), tmp_path / n, include_base=True)) for n in ("base", "student")]
    data = write_split(tmp_path / "data", [receipt("a"), receipt("b", 90, 260)])
    given = ["--model", names[0], "--student", names[1], "--data", data, "--kinds", "receipts", "--device", "cpu"]
    given += ["--max-new-tokens", 2, "--cap", 12, "--caps", 8, "--coverage", 2, "--crop-min-px", 40]
    given = [str(w) for w in [*given, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]]
    assert main([*given, "--minutes", "0.0000001"]) == 3
    assert main(given) == 0
    found = json.loads((tmp_path / "results" / "r2i.json").read_text(encoding="utf-8"))["kinds"]["receipts"]
    assert set(found["caps"]) == {"12", "8"}
    assert found["caps"]["12"]["difference"]["gap"]["difference"] == 0.0
    assert found["caps"]["12"]["difference"]["full"]["interval"] == [0.0, 0.0]
    assert set(found["caps"]["8"]["difference"]) == {"n", "dropped", "full", "zoom", "negatives"}
    assert found["attention"]["head_lift"]["difference"] == 0.0
    assert "boxed" in found["caps"]["12"]["difference"]
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.json*")}
    assert main(given) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.json*")} == before
    (path,) = (tmp_path / "runs").rglob("coverage.json")
    measured = json.loads(before[path])
    asked = measured["asked"]
    assert (asked["pictures"], asked["max_visual_tokens"], asked["model"]["device"]) == (["a", "b"], 12, "cpu")
    for change in ({"pictures": ["a"]}, {"max_visual_tokens": 8}):
        path.write_text(json.dumps(measured | {"asked": asked | change, "rows": []}), encoding="utf-8")
        assert main(given) == 0
        assert path.read_bytes() == before[path]
    next((tmp_path / "runs").rglob("boxed.jsonl")).unlink()
    assert main([*given, "--no-boxed"]) == 0
    found = json.loads((tmp_path / "results" / "r2i.json").read_text(encoding="utf-8"))["kinds"]["receipts"]
    assert set(found["caps"]["12"]["difference"]) == {"n", "dropped", "full", "region", "zoom", "gap", "negatives"}
