"""Asking one by one, in batches and by other methods gives rows that say all there is to know."""

import dataclasses

import pytest
import torch

from qzoom.config import TokenBudget
from qzoom.data.questions import read_receipts
from qzoom.data.samples import AnswerRow, EvalQuestion, EvalSample
from qzoom.errors import ConfigError
from qzoom.evaluation.runner import EvalOptions, ask_many, ask_sample, run
from qzoom.model import QZoom
from tests.evaluation.samples import model, receipt, write_split
from tests.tiny_models import build_engine

SHORT = EvalOptions("auto", TokenBudget(4, 12), TokenBudget(4, 9), max_new_tokens=4)


@pytest.fixture
def task(tmp_path):
    records = [receipt("a"), receipt("b", 90, 260), receipt("c", 300, 150)]
    return read_receipts(write_split(tmp_path / "data", records), "dev")


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


def test_one_damaged_picture_does_not_spoil_its_batch(task):
    task.sample(1).image.write_bytes(b"\x89PNG no more")
    rows = run(model(), task, SHORT, batch_size=9)
    assert [row.error is None for row in rows] == [True] * 3 + [False] * 3 + [True] * 3


def test_unusable_samples_stay_in_place():
    broken = EvalSample("x", None, (0, 0), (EvalQuestion("f", "Q?", "A"),), "no such row")
    rows = ask_many(model(), [broken, broken], SHORT)
    assert [[row.error for row in one] for one in rows] == [["no such row"]] * 2
    assert rows[0][0].prompt == ""
    assert rows[0][0].coarse_size_px is None


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


def test_seeds_draw_other_answers_and_repeat_their_own(task):
    warm = dataclasses.replace(SHORT, temperature=5.0, max_new_tokens=8)
    first, again, other = (
        [r.prediction for r in run(model(), task, dataclasses.replace(warm, seed=seed), batch_size=size)]
        for seed, size in ((0, 1), (0, 4), (1, 1))
    )
    assert first == again
    assert first != other


def test_random_boxes_follow_the_seed(task):
    boxes = [
        [r.regions[0].box for r in run(model(), task, dataclasses.replace(SHORT, method="random", seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert boxes[0] == boxes[1]
    assert boxes[0] != boxes[2]


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


def test_what_draws():
    assert not EvalOptions().is_random
    assert not EvalOptions(method="centre").is_random
    assert EvalOptions(method="random").is_random
    assert EvalOptions(temperature=0.5).is_random
