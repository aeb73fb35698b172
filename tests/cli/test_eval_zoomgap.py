import json

import pytest

from tests.evaluation.samples import receipt, write_split


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Receipts in a folder of its own, beside which those of other tasks may lie."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "receipts", [receipt("a"), receipt("b", 90, 260)])
    return folder / "receipts"


@pytest.fixture
def zoomgap(here, checkpoint):
    def call(*words, model=checkpoint):
        small = ("--device", "cpu", "--max-new-tokens", 2, "--max-visual-tokens", 24)
        return here("eval", "zoomgap", *words, "--model", model, *small)

    return call


def test_one_line(zoomgap, here, data, tmp_path):
    result = zoomgap("--data", data, "--split", "dev", "--json", "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    found = json.loads(result.out)
    assert found["n"] == 4
    assert all(0 <= found[view] <= 1 for view in ("full", "region", "boxed", "zoom"))
    assert found["gap"] == pytest.approx(found["region"] - found["full"])
    low, high = found["gap_interval"]
    assert low <= found["gap"] <= high
    assert (found["split"], found["max_visual_tokens"], found["zoom_mode"]) == ("dev", 24, "auto")
    assert set(found["per_kind"]) == {"total", "date"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "boxed.jsonl", "full.jsonl", "region.jsonl", "zoom.jsonl",
    ]  # fmt: skip
    again = here("eval", "zoomgap", "--rescore", tmp_path / "run", "--json", "--compare", tmp_path / "run")
    assert again.code == 0, again.err
    second = json.loads(again.out)
    compared = second.pop("compare")
    for key in ("n", "gap", "gap_interval", "per_kind", "per_area", "negatives", "crop_scale", "crop_margin"):
        assert second[key] == found[key]
    assert (compared["n"], compared["gap"]["difference"], compared["full"]["interval"]) == (4, 0.0, [0.0, 0.0])
    table = here("eval", "zoomgap", "--rescore", tmp_path / "run", "--compare", tmp_path / "run")
    assert table.out.splitlines()[0] == "4 questions with a place, 2 pictures"
    assert "gap (region - full)" in table.out
    assert "difference" in table.out
    assert "left out of the comparison" not in table.out
    again = ("--data", data, "--split", "dev", "--compare", tmp_path / "run")
    zoomgap(*again, "--crop-margin", 0.3).refuses(1, "crop_margin is 0.3 here and 0.1 there")
    part = zoomgap(*again, "--limit", 1, "--views", "full,zoom", "--crop-margin", 0.3)
    assert part.code == 0, part.err
    assert "3 questions that only one of the runs has are left out of the comparison" in part.out


def test_scenes_by_name(zoomgap):
    result = zoomgap("scenes", "--count", 1, "--seed", 5, "--views", "full,region", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["task"], found["seed"], found["zoom"]) == ("scenes", 5, None)
    assert found["n"] > 3


def test_receipts_beside_the_data_of_other_tasks(zoomgap, data):
    result = zoomgap("receipts", "--data", data.parent, "--views", "full,region", "--limit", 1, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["n"] == 2


def test_without_a_region_branch(here, headless, data):
    words = ("--model", headless, "--device", "cpu", "--max-new-tokens", 2, "--max-visual-tokens", 24)
    result = here("eval", "zoomgap", "--data", data, "--limit", 1, "--json", *words)
    assert result.code == 0, result.err
    assert "the zoom view is left out" in result.err
    assert json.loads(result.out)["zoom"] is None
    asked = here("eval", "zoomgap", "--data", data, "--limit", 1, "--views", "full,zoom", *words)
    assert asked.code == 1
    assert "no region branch" in asked.err


WRONG = {
    "no data": ((), "--data"),
    "unknown task": (("docvqa",), "known: questions, documents, scenes, zoombench"),
    "views": (("--data", ".", "--views", "region"), "full"),
    "scale": (("--data", ".", "--crop-scale", "twice"), "--crop-scale"),
    "style": (("--data", ".", "--box-style", "text"), "'rectangle', 'ellipse', 'dim'"),
    "fresh alone": (("--data", ".", "--fresh"), "--output"),
    "seed for files": (("--data", ".", "--seed", "3"), "--seed has no meaning"),
    "data for seeds": (("scenes", "--data", "."), "--data has no meaning"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_calls(zoomgap, kind):
    words, said = WRONG[kind]
    zoomgap(*words).refuses(2, said)


def test_bad_runs(here, tmp_path):
    for flag in ("--rescore", "--compare"):
        count = ("--count", 1) if flag == "--compare" else ()
        here("eval", "zoomgap", "scenes", *count, flag, tmp_path).refuses(1, "no answers of the full view")
    for flag, value in (("--limit", 3), ("--data", "."), ("--output", "x"), ("--count", 1)):
        here("eval", "zoomgap", "--rescore", tmp_path, flag, value).refuses(2, f"leave {flag} out")
    here("eval", "zoomgap", "--rescore", tmp_path, "--views", "full").refuses(2, "leave settings of views out")
