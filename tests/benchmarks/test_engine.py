"""The benchmark of the engine: sizes that fit together, and a page that says what was measured."""

import pytest

from benchmarks.engine import page, shape_of, summary

SECONDS = {
    "generate": (8.0, 10.0),
    "auto, no zoom": (8.0, 9.5),
    "never": (7.0, 9.0),
    "session, 2nd": (0.5, 1.5),
    "auto, zoom": (10.0, 12.0),
    "8 single calls": (70.0, 90.0),
    "batch of 8": (63.0, 68.0),
}


@pytest.mark.parametrize("hidden", [None, 256, 512, 2048])
def test_heads_fit_any_width(hidden):
    for quick in (True, False):
        shape = shape_of(quick=quick, hidden=hidden, coarse=144, layers=None)
        assert shape["heads"] % shape["kv_heads"] == 0
        assert shape["coarse"] == 144
        assert shape["layers"] == (8 if quick else 28)


def test_ratios_and_the_page():
    answers = {name: [(1, 2)] for name in SECONDS}
    found = summary(SECONDS, answers, 11)
    assert found["unzoomed_auto_vs_generate"] == 0.95
    assert found["session_second_vs_generate"] == 0.15
    assert (found["batch8_vs_8_single"], found["batch8_prefill_vs_8_single"]) == (0.756, 0.9)
    assert found["batch8_step_vs_8_single"] == 0.25
    assert found["batch8_at_length"]["128"] == round((63 + 127 * 0.5) / (70 + 127 * 2), 3)
    where = {"threads": 2, "cpu": " AMD", "torch": "2.13", "device": "cpu", "transformers": "5.23"}
    record = {
        "shape": shape_of(quick=False, hidden=None),
        "parameters": 612e6,
        "tokens": 11,
        "repeats": 3,
    }
    record |= {"long_repeats": 1, "machine": where, "dtypes": {"float32": found}}
    text = page(record, "float32")
    assert "| batch of 8 | 68.00 | 63.00 | 500 |" in text
    assert "| second un-zoomed question in a session, to generate | 0.15 | 0.17 |" in text
    assert "Same tokens" in text
    found["same_tokens"]["never"] = False
    assert "TOKENS DIFFER" in page(record, "float32")
