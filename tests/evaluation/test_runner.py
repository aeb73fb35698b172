import dataclasses
import json

import pytest
import torch

from qzoom.checkpoints.weights import weights_digest
from qzoom.config import TokenBudget
from qzoom.data.benchmarks.registry import open_task
from qzoom.data.questions import read_receipts
from qzoom.data.samples import AnswerRow, Sample, SampleQuestion, read_answers
from qzoom.errors import ConfigError, DataError, HeadsMissingError, QZoomError
from qzoom.evaluation.runner import EvalOptions, ask_many, ask_sample, run
from qzoom.evaluation.score import score
from qzoom.model import QZoom
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
        assert (row.size_px, row.error) == (sample.size_px, None)
        assert row.seconds > 0
    found = score(rows)
    assert found.visual_tokens * 9 == pytest.approx(sum(r.usage.coarse_tokens + r.usage.region_tokens for r in rows))
    assert found.zoomed * 9 == pytest.approx(sum(r.zoomed for r in rows))
    assert (found.zoomed == 0) == (zoom == "never")


def test_limit_counts_pictures_and_weights_are_told_apart(task):
    seen = []
    rows = run(model(), task, SHORT, limit=2, on_picture=lambda done, total: seen.append((done, total)))
    assert [row.picture for row in rows] == ["a"] * 3 + ["b"] * 3
    assert seen == [(1, 2), (2, 2)]
    made = build_engine("qwen3_vl")
    before = weights_digest(made)
    assert before == weights_digest(engine("qwen3_vl"))
    assert before != weights_digest(dataclasses.replace(made, gate=None))
    made.region.layers[0].self_attn.q_proj.weight[0, 0] += 1
    assert before != weights_digest(made)


def test_a_rerun_continues(task, tmp_path):
    output = tmp_path / "run.jsonl"
    first = run(model(), task, SHORT, limit=1, output=output)
    kept = output.read_bytes()
    rows = run(model(), task, SHORT, output=output)
    assert rows[:3] == first
    assert output.read_bytes().startswith(kept)
    assert len(output.read_bytes().splitlines()) == 1 + 3
    assert without_times(rows) == without_times(run(model(), task, SHORT))
    whole = output.read_bytes()
    assert run(model(), task, SHORT, output=output) == rows
    assert output.read_bytes() == whole


def test_a_rerun_after_a_kill_repeats_only_the_broken_picture(task, tmp_path):
    output = tmp_path / "run.jsonl"
    run(model(), task, SHORT, output=output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    run(model(), task, SHORT, output=output)
    again = output.read_bytes().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert [json.loads(line)["key"] for line in again[1:]] == list("abc")
    output.write_bytes(b"".join(again).replace(b'"index": 1', b'"index": 2', 1))
    with pytest.raises(DataError, match="answers about 'a' are out of order"):
        run(model(), task, SHORT, output=output)


def test_a_rerun_with_other_settings_is_refused(task, tmp_path):
    output = tmp_path / "run.jsonl"
    run(model(), task, SHORT, limit=1, output=output)
    with pytest.raises(ConfigError, match=r"options\.zoom was 'auto', is 'never'"):
        run(model(), task, dataclasses.replace(SHORT, zoom="never"), output=output)
    with pytest.raises(ConfigError, match=r"model\.weights was"):
        run(model(seed=1), task, SHORT, output=output)
    rows = run(model(seed=1), task, SHORT, limit=1, output=output, fresh=True)
    assert len(rows) == 3


def test_a_damaged_picture_is_wrong_answers_and_spoils_no_batch(task, tmp_path):
    task.sample(1).image.write_bytes(b"\x89PNG no more")
    rows = run(model(), task, SHORT, output=tmp_path / "run.jsonl")
    failed = [row for row in rows if row.error]
    assert [(row.picture, row.index) for row in failed] == [("b", 0), ("b", 1), ("b", 2)]
    assert all("b.png" in row.error and row.prediction == "" and row.gate is None for row in failed)
    found = score(rows)
    assert (found.n, found.errors) == (9, 3)
    assert run(model(), task, SHORT, output=tmp_path / "run.jsonl") == rows
    task.sample(1).image.write_bytes(b"\x89PNG no more")
    rows = run(model(), task, SHORT, batch_size=9)
    assert [row.error is None for row in rows] == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.parametrize("batch_size", [1, 9])
def test_a_rerun_asks_again_what_failed_for_a_reason_that_may_pass(task, tmp_path, batch_size):
    output, away = tmp_path / "run.jsonl", tmp_path / "away.png"
    lost, damaged = task.sample(0).image, task.sample(1).image
    whole = [row.prediction for row in run(model(), task, SHORT, batch_size=batch_size)]
    lost.rename(away)
    good = damaged.read_bytes()
    damaged.write_bytes(b"no picture")
    rows = run(model(), task, SHORT, output=output, batch_size=batch_size)
    assert [(row.error is None, row.passing) for row in rows[::3]] == [(False, True), (False, False), (True, False)]
    away.rename(lost)
    damaged.write_bytes(good)
    rows = run(model(), task, SHORT, output=output, batch_size=batch_size)
    assert [row.prediction for row in rows[:3]] == whole[:3]
    assert all(row.error for row in rows[3:6])  # final until --fresh
    assert [json.loads(line)["key"] for line in output.read_bytes().splitlines()[1:]] == list("abca")
    assert sorted(read_answers(output)[1], key=lambda row: (row.picture, row.index)) == rows
    kept = output.read_bytes()
    assert run(model(), task, SHORT, output=output, batch_size=batch_size) == rows
    assert output.read_bytes() == kept
    rows = run(model(), task, SHORT, output=output, fresh=True, batch_size=batch_size)
    assert [row.prediction for row in rows] == whole


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
    for changes in ({"zoom": "always"}, {"method": "always"}, {"method": "margin"}):
        with pytest.raises(HeadsMissingError, match="never"):
            run(plain, task, dataclasses.replace(SHORT, **changes))
    never, auto = (run(plain, task, dataclasses.replace(SHORT, zoom=zoom), limit=1) for zoom in ("never", "auto"))
    assert [row.prediction for row in never] == [row.prediction for row in auto]
    assert len(auto) == 3
    assert all("no region branch" in row.gate.note for row in auto)


def test_wrong_settings_are_found_before_the_first_question(task):
    with pytest.raises(ConfigError):
        run(model(), task, dataclasses.replace(SHORT, gate_threshold=1.5))
    with pytest.raises(ConfigError, match="region_tokens must be"):
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


def same(rows):
    """Rows without what differs from run to run or with who shares a look."""
    usage = [dataclasses.replace(row.usage, reused_tokens=0) for row in rows]
    return [
        dataclasses.replace(row, seconds=0.0, timing_ms={}, usage=u, gate=None)
        for row, u in zip(rows, usage, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batches_give_the_same_answers(task, batch_size):
    alone = run(model(), task, SHORT)
    together = run(model(), task, SHORT, batch_size=batch_size)
    assert [r.prediction for r in together] == [r.prediction for r in alone]
    for first, second in zip(same(alone), same(together), strict=True):
        boxes = [[region.box for region in row.regions] for row in (first, second)]
        assert boxes[0] == boxes[1]
        assert dataclasses.replace(first, regions=()) == dataclasses.replace(second, regions=())


def test_unusable_samples_stay_in_place():
    broken = Sample("x", None, (0, 0), (SampleQuestion("f", "Q?", "A"),), "no such row")
    rows = ask_many(model(), [broken, broken], SHORT)
    assert [[row.error for row in one] for one in rows] == [["no such row"]] * 2
    assert (rows[0][0].prompt, rows[0][0].coarse_size_px) == ("", None)


def test_rows_hold_prompt_and_resolved_pixels(task):
    asked = model()
    rows = ask_sample(asked, task.sample(1), dataclasses.replace(SHORT, zoom="always", region_threshold=0.0))
    grid = asked.engine.backbone.grid((90, 260), SHORT.coarse_tokens)
    for row in rows:
        assert row.coarse_size_px == (grid[1] * 32, grid[0] * 32)
        assert row.usage.coarse_tokens == grid[0] * grid[1]
        assert row.regions[0].crop_size_px is not None
        assert row.prompt.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + row.question)
        assert row.prompt.endswith("<|im_start|>assistant\n")
        assert AnswerRow.from_dict(row.to_dict()) == row


def test_methods_set_how_it_looks(task):
    plain = run(model(), task, dataclasses.replace(SHORT, method="plain"), limit=1)
    never = run(model(), task, dataclasses.replace(SHORT, zoom="never"), limit=1)
    assert [r.prediction for r in plain] == [r.prediction for r in never]
    assert not any(row.zoomed for row in plain)
    centre = run(model(heads=False), task, dataclasses.replace(SHORT, method="centre"), limit=1)
    assert all(row.zoomed and row.error is None for row in centre)
    agentic = run(model(heads=False), task, dataclasses.replace(SHORT, method="agentic"), limit=1)
    assert all(row.extra["other_tokens"] > row.usage.coarse_tokens for row in agentic)  # its first round is paid too
    assert EvalOptions(method="plain").zoom_mode == "never"
    assert EvalOptions(method="always", zoom="never").zoom_mode == "always"
    assert EvalOptions(method="centre").zoom_mode == "always"


def test_a_shared_look_uses_the_needed_branches_only(task):
    """A gate and a region branch that cannot run would fail a look that uses them; the plain look never meets them."""
    broken = QZoom(build_engine("qwen3_vl"), "random")
    for branch in (broken.engine.gate, broken.engine.region):
        branch.layers = torch.nn.ModuleList([torch.nn.Identity()] * len(branch.layers))
    plain = dataclasses.replace(SHORT, method="plain")
    rows = ask_sample(broken, task.sample(0), plain)
    assert [row.error for row in rows] == [None] * 3
    assert [row.prediction for row in rows] == [row.prediction for row in ask_sample(model(), task.sample(0), plain)]
    assert all(row.error for row in ask_sample(broken, task.sample(0), plain, all_branches=True))


def test_seeds_draw_answers_and_boxes_of_their_own(task):
    warm = dataclasses.replace(SHORT, temperature=5.0, max_new_tokens=8)
    first, again, other = (
        [r.prediction for r in run(model(), task, dataclasses.replace(warm, seed=seed), batch_size=size)]
        for seed, size in ((0, 1), (0, 4), (1, 1))
    )
    assert first == again
    assert first != other
    boxes = [
        [r.regions[0].box for r in run(model(), task, dataclasses.replace(SHORT, method="random", seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert boxes[0] == boxes[1]
    assert boxes[0] != boxes[2]
    assert not EvalOptions().is_random
    assert not EvalOptions(method="centre").is_random
    assert EvalOptions(method="random").is_random
    assert EvalOptions(temperature=0.5).is_random


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "guess"}, "No method 'guess'; known methods: qzoom"),
        ({"method": "centre", "temperature": 1.0}, "greedily"),
    ],
)
def test_wrong_options(values, said):
    with pytest.raises(ConfigError, match=said):
        EvalOptions(**values)
