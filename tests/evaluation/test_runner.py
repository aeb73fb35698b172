"""The runner asks a random model for real: its answers are nonsense, their bookkeeping is not."""

import dataclasses
import json

import pytest

from qzoom.config import TokenBudget
from qzoom.data.benchmarks.registry import open_task
from qzoom.data.questions import read_receipts
from qzoom.errors import BudgetError, ConfigError, HeadsMissingError, QZoomError
from qzoom.evaluation.runner import EvalOptions, run, weights_digest
from qzoom.evaluation.score import score
from tests.evaluation.samples import model, receipt, write_split
from tests.tiny_models import build_engine, engine

COARSE, REGION = TokenBudget(4, 12), TokenBudget(4, 9)
SHORT = EvalOptions("auto", COARSE, REGION, max_new_tokens=4)


@pytest.fixture
def task(tmp_path):
    """Three pictures of different sizes, three questions each."""
    records = [receipt("a"), receipt("b", 90, 260), receipt("c", 300, 150)]
    return read_receipts(write_split(tmp_path / "data", records), "dev")


def without_times(rows):
    return [dataclasses.replace(row, seconds=0.0, timing_ms={}) for row in rows]


@pytest.mark.parametrize("zoom", ["never", "auto", "always"])
def test_every_row_is_what_asking_gives(task, zoom):
    asked = model()
    rows = run(asked, task, dataclasses.replace(SHORT, zoom=zoom))
    assert [(row.picture, row.index) for row in rows] == [(name, i) for name in "abc" for i in range(3)]
    for row in rows:
        sample = task.sample("abc".index(row.picture))
        alone = asked.ask(
            sample.image, row.question, zoom=zoom, coarse_tokens=COARSE, region_tokens=REGION, max_new_tokens=4
        )
        assert (row.prediction, row.finish_reason) == (alone.text, alone.finish_reason)
        assert row.zoomed == alone.gate.zoomed
        assert [region.box for region in row.regions] == [region.box for region in alone.regions]
        assert row.usage.coarse_tokens == alone.usage.coarse_tokens <= 12
        assert row.usage.region_tokens == alone.usage.region_tokens <= 9
        assert row.answer == sample.questions[row.index].answer
        assert row.size_px == sample.size_px
        assert row.error is None
        assert row.seconds > 0
    found = score(rows)
    assert found.visual_tokens * 9 == pytest.approx(sum(r.usage.coarse_tokens + r.usage.region_tokens for r in rows))
    assert found.zoomed * 9 == pytest.approx(sum(r.zoomed for r in rows))
    assert (found.zoomed == 0) == (zoom == "never")


def test_limit_counts_pictures(task):
    seen = []
    rows = run(model(), task, SHORT, limit=2, on_picture=lambda done, total: seen.append((done, total)))
    assert [row.picture for row in rows] == ["a"] * 3 + ["b"] * 3
    assert seen == [(1, 2), (2, 2)]


def test_a_rerun_continues(task, tmp_path):
    output = tmp_path / "run.jsonl"
    first = run(model(), task, SHORT, limit=1, output=output)
    kept = output.read_bytes()
    rows = run(model(), task, SHORT, output=output)
    assert rows[:3] == first
    assert output.read_bytes().startswith(kept)
    assert len(output.read_bytes().splitlines()) == 1 + 9
    assert without_times(rows) == without_times(run(model(), task, SHORT))
    whole = output.read_bytes()
    assert run(model(), task, SHORT, output=output) == rows
    assert output.read_bytes() == whole


def test_a_rerun_after_a_kill_repeats_only_the_broken_picture(task, tmp_path):
    output = tmp_path / "run.jsonl"
    run(model(), task, SHORT, output=output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    run(model(), task, SHORT, output=output)
    again = output.read_bytes().splitlines(keepends=True)
    assert again[:4] == lines[:4]
    assert [json.loads(line)["picture"] for line in again[1:]] == [name for name in "abc" for _ in range(3)]


def test_a_rerun_with_other_settings_is_refused(task, tmp_path):
    output = tmp_path / "run.jsonl"
    run(model(), task, SHORT, limit=1, output=output)
    with pytest.raises(ConfigError, match=r"options\.zoom was 'auto', is 'never'"):
        run(model(), task, dataclasses.replace(SHORT, zoom="never"), output=output)
    with pytest.raises(ConfigError, match=r"model\.weights was"):
        run(model(seed=1), task, SHORT, output=output)
    rows = run(model(seed=1), task, SHORT, limit=1, output=output, fresh=True)
    assert len(rows) == 3


def test_weights_are_told_apart():
    made = build_engine("qwen3_vl")
    before = weights_digest(made)
    assert before == weights_digest(engine("qwen3_vl"))
    assert before != weights_digest(dataclasses.replace(made, gate=None))
    made.region.layers[0].self_attn.q_proj.weight[0, 0] += 1
    assert before != weights_digest(made)


def test_a_damaged_picture_is_wrong_answers(task, tmp_path):
    task.sample(1).image.write_bytes(b"\x89PNG no more")
    rows = run(model(), task, SHORT, output=tmp_path / "run.jsonl")
    failed = [row for row in rows if row.error]
    assert [(row.picture, row.index) for row in failed] == [("b", 0), ("b", 1), ("b", 2)]
    assert all("b.png" in row.error and row.prediction == "" and row.gate is None for row in failed)
    found = score(rows)
    assert (found.n, found.errors) == (9, 3)
    assert run(model(), task, SHORT, output=tmp_path / "run.jsonl") == rows


def test_a_question_that_fails_leaves_the_others_alone(tmp_path):
    record = receipt("a")
    record["questions"][1]["question"] = "When? " * 50_000
    task = read_receipts(write_split(tmp_path, [record]), "dev")
    rows = run(model(), task, SHORT)
    assert [row.error is None for row in rows] == [True, False, True]


def test_nothing_but_errors_is_an_error(tmp_path):
    task = read_receipts(write_split(tmp_path, [receipt("a")]), "dev")
    task.sample(0).image.write_bytes(b"")
    with pytest.raises(QZoomError, match="None of 3 questions could be asked"):
        run(model(), task, SHORT)


def test_zooming_needs_a_region_branch(task):
    plain = model(heads=False)
    for zoom in ("auto", "always"):
        with pytest.raises(HeadsMissingError, match="never"):
            run(plain, task, dataclasses.replace(SHORT, zoom=zoom))
    assert len(run(plain, task, dataclasses.replace(SHORT, zoom="never"), limit=1)) == 3


def test_wrong_settings_are_found_before_the_first_question(task):
    with pytest.raises(ConfigError):
        run(model(), task, dataclasses.replace(SHORT, gate_threshold=1.5))
    with pytest.raises(BudgetError):
        run(model(), task, dataclasses.replace(SHORT, region_tokens="many"))


@pytest.mark.parametrize("name", ["documents", "scenes"])
def test_synthetic_tasks_run(name):
    task = open_task(name, seed=3, count=1)
    rows = run(model(), task, EvalOptions("always", COARSE, REGION, max_new_tokens=2, region_threshold=0.0))
    sample = task.sample(0)
    assert [(row.question, row.answer, row.easy) for row in rows] == [
        (q.question, q.answer, q.easy) for q in sample.questions
    ]
    found = score(rows, task.fields)
    assert set(found.exact_match) == {q.field for q in sample.questions} | {"all"}
    assert found.zoomed == 1.0
    assert 0 < found.box_area <= 1
    assert sum(group["n"] for group in found.difficulty.values()) == found.n
