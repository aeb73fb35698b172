import json

import pytest

from benchmarks.scale import at_depth, compare, depths, markdown, report, zoom_shares


def test_the_mean_of_both_outcomes_is_weighted_with_the_share_of_zoomed_questions():
    seconds = {"plain 1024": 10.0, "plain 4096": 60.0}
    seconds |= {
        f"{pair}, {outcome}": s
        for pair in ("144 + 144", "64 + 144")
        for outcome, s in (("no zoom", 1.0), ("zoomed", 3.0))
    }
    flops = {name: int(value * (2 if name.startswith("plain") else 1)) for name, value in seconds.items()}
    rows = compare(seconds, flops, {"scenes": 0.25})
    assert [(row["pair"], row["cap"]) for row in rows] == [
        (p, c) for p in ("144 + 144", "64 + 144") for c in (1024, 4096)
    ]
    assert rows[0]["faster"] == pytest.approx(10 / 1.5, abs=1e-3)
    assert rows[0]["reached"] == 0.5


def test_the_shares_are_those_of_the_kept_results():
    assert all(0 < share < 1 for share in zoom_shares().values())


def lines(depth, of=36):
    names = ["plain 1024", "plain 4096"]
    names += [f"{pair}, {outcome}" for pair in ("144 + 144", "64 + 144") for outcome in ("no zoom", "zoomed")]
    machine = {"threads": 1, "cpu": "a CPU", "torch": "2", "transformers": "5"}
    facts = {"of": of, "name": "big", "dtype": "bfloat16", "answer_tokens": 4, "clock": "cpu", "machine": machine}
    return [
        facts | {"case": name, "layers": depth, "seconds": 1.0 + i + 2 * depth * (i + 1), "tflops": depth * (i + 1) / 4}
        for i, name in enumerate(names)
    ]


def test_cases_not_measured_at_the_full_depth_lie_on_a_straight_line():
    some = lines(6) + lines(12)
    assert at_depth(some, "plain 4096", "seconds", 36) == (2 + 4 * 36, False)
    assert at_depth(lines(12), "plain 4096", "seconds", 36) is None
    deep = lines(36)
    deep[0]["seconds"] = 146.0
    assert at_depth(some + deep, "plain 1024", "seconds", 36) == (146.0, True)
    text = markdown(report(some + deep[:1]))
    assert "plain 1024 73.0 s for 146.0 s measured (-50%)" in text
    assert "| plain 4096 | 26.0 | 50.0 | – | 6.00 | 146.0 (extended) | 18.00 | 0.123 |" in text
    assert "Random weights: speed only" in text
    assert report(lines(6))["ratios"] == []


def test_a_shallower_model_keeps_the_proportions(tmp_path):
    text, vision = {"num_hidden_layers": 36}, {"depth": 24, "deepstack_visual_indexes": [5, 11, 17]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}))
    whole, third = depths(path, 0), depths(path, 12)
    assert (whole["layers"], whole["K"], whole["T"]) == (36, 24, 3)
    assert (third["layers"], third["of"], third["K"], third["T"]) == (12, 36, 8, 1)
    assert third["settings"]["vision_config"] == {"depth": 8, "deepstack_visual_indexes": [1, 3, 5]}
    assert "model_type" not in third["settings"]
