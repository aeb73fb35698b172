import pytest

from benchmarks.scale import compare, zoom_shares


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
