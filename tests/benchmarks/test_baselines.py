import dataclasses
import json

import pytest

from benchmarks.baselines import fronts, main, values_of, words
from qzoom.checkpoints.adapter import save_pretrained
from qzoom.evaluation.report_figures import RunFigures, TaskFigures
from tests.evaluation.samples import receipt, write_split
from tests.tiny_models import engine


def figures(label, method, accuracy, tokens, caps=(144, 144)):
    return RunFigures(
        label, method, "tiny", caps, accuracy, (accuracy - 0.1, accuracy + 0.1), None, None, 0.5, None,
        tokens / 1000, tokens, tokens / 100, 0,
    )  # fmt: skip


TABLE = TaskFigures(
    "scenes",
    20,
    2,
    0,
    {},
    (
        figures("plain, ≤ 288", "plain", 0.30, 280, (288, None)),
        figures("qzoom, ≤ 144 + 144", "qzoom", 0.50, 200),
        figures("always, ≤ 144 + 144", "always", 0.48, 270),
        figures("oracle, ≤ 144 + 144", "oracle", 0.70, 180),
        figures("entropy, ≤ 144 + 144", "entropy", 0.50, 210),
    ),
    "plain, ≤ 288",
    {},
    None,
    (),
)


def test_the_front_leaves_the_oracle_out_and_is_told():
    found = fronts(TABLE)["visual_tokens"]
    assert found["front"] == ("qzoom, ≤ 144 + 144",)
    assert found["beaten"] == {"always, ≤ 144 + 144": ["qzoom, ≤ 144 + 144"]}
    worse = dataclasses.replace(TABLE, runs=(*TABLE.runs, figures("margin, ≤ 144 + 144", "margin", 0.6, 150)))
    assert fronts(worse)["gflops"]["beaten"] == {
        "qzoom, ≤ 144 + 144": ["margin, ≤ 144 + 144"],
        "always, ≤ 144 + 144": ["margin, ≤ 144 + 144"],
    }
    text = "\n".join(words(TABLE, finished=False))
    assert "20 questions about 2 pictures. **Not finished" in text
    assert "| qzoom, ≤ 144 + 144 | 50.0 | 40.0 to 60.0 | 50.0 | – | 200 | 2 | 71.4 | 0.200 | 0 |" in text
    assert "- Not on it: “always, ≤ 144 + 144”, which “qzoom, ≤ 144 + 144” beats." in text


def test_seconds_of_runs_made_one_after_another_are_not_compared():
    pair = {"cap": 288, "run": "qzoom", "plain": "plain", "difference": 0.2, "interval": (0.1, 0.3)}
    orders = dict.fromkeys(("seconds", "visual_tokens", "gflops"), (TABLE.runs[0].label,))
    task = dataclasses.replace(
        TABLE, fronts=orders, equal_accuracy={"throughput": 2.0}, equal_budget=(pair | {"throughput": 0.5},)
    )
    found = values_of(task)
    assert list(found["fronts"]) == list(found["without_oracle"]) == ["visual_tokens", "gflops"]
    assert (found["equal_budget"], "equal_accuracy" in found) == ([pair], False)
    assert found["runs"][1]["seconds"] == 0.2
    assert "against seconds" not in "\n".join(words(task, finished=True))


@pytest.mark.slow
def test_methods_on_receipts(tmp_path):
    model = save_pretrained(engine("qwen3_vl"), tmp_path / "model", include_base=True)
    data = write_split(tmp_path / "data", [receipt("a"), receipt("b", 90, 260)])
    given = ["--model", model, "--data", data, "--kinds", "receipts", "--device", "cpu", "--max-new-tokens", 2]
    given += ["--budgets", 12, "--methods", "plain", "qzoom", "centre", "oracle", "margin"]
    given = [str(w) for w in [*given, "--runs", tmp_path / "runs", "--results", tmp_path / "results"]]
    assert main([*given, "--minutes", "0.0000001"]) == 3
    text = (tmp_path / "results" / "baselines.md").read_text(encoding="utf-8")
    assert "Made by" in text
    assert main(given) == 0
    found = json.loads((tmp_path / "results" / "baselines.json").read_text(encoding="utf-8"))["kinds"]["receipts"]
    assert found["finished"]
    assert [line["method"] for line in found["runs"]] == ["plain", "qzoom", "centre", "margin", "oracle"]
    assert all(line["visual_tokens"] <= 12 for line in found["runs"])
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.jsonl")}
    assert len(before) == 5
    assert main(given) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*.jsonl")} == before
