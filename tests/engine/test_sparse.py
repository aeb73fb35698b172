import dataclasses

import numpy as np
import pytest
import torch

from qzoom.config import BoxRule, RereadRule, TokenBudget, ZoomConfig
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.zoom import enlarged, zoom
from qzoom.errors import ConfigError
from qzoom.heads.boxes import boxes_from_maps, foreground_tokens
from qzoom.model import QZoom
from tests import tiny_models
from tests.flow import request
from tests.plain import full_pass

PAGE = tiny_models.picture(31, 400, 300)
QUESTION = "What is the total amount?"
RULE = BoxRule(scaling="exact", threshold="relative", sparse=3.0)


def corners() -> torch.Tensor:
    """A map of 6 x 8 cells with two far apart, whose box is 4 x 6: the foreground takes 1/12 of it."""
    out = torch.zeros(6, 8)
    out[1, 1], out[4, 6] = 0.9, 0.8
    return out


def test_the_tokens_of_a_hand_made_map():
    (box,) = boxes_from_maps([corners()], [(800, 600)], threshold=0.5, rule=RULE, token_px=32)
    assert box.box == (100, 100, 700, 500)
    near = foreground_tokens(box, (8, 12), 0.0)  # two tokens a cell, and the next ones
    expected = np.zeros((8, 12), dtype=bool)
    expected[:3, :3] = expected[-3:, -3:] = True
    assert np.array_equal(near, expected)
    expected[:5, :5] = expected[-5:, -5:] = True  # the margin's cell on each side comes with it
    assert np.array_equal(foreground_tokens(box, (8, 12), 1.0), expected)
    assert boxes_from_maps([corners()], [(800, 600)], threshold=0.5, rule=BoxRule(), token_px=32)[0].foreground is None


@pytest.mark.parametrize("limits", [(1, 24), (24, 24), (1, 100), (100, 100)])
def test_the_budget_holds_and_the_crop_grows(limits):
    backbone, budget = tiny_models.engine("qwen3_vl").backbone, TokenBudget(*limits)
    (box,) = boxes_from_maps([corners()], [(3200, 2400)], threshold=0.5, rule=RULE, token_px=32)
    size = (2400, 1600)
    grid, before = (backbone.grid(size, one) for one in (enlarged(backbone, box, budget, RULE), budget))
    read = int(foreground_tokens(box, grid, 0.0).sum())
    assert limits[1] / 3 < read <= limits[1]
    assert grid[0] * grid[1] > 2 * before[0] * before[1]
    assert grid[0] * grid[1] <= 9 * limits[1]
    assert enlarged(backbone, dataclasses.replace(box, foreground=None), budget, RULE) == budget
    full = dataclasses.replace(box, foreground=np.ones((6, 8), dtype=bool))
    assert enlarged(backbone, full, budget, RULE) == budget


def sparse(family: str, **config: object) -> QZoom:
    base = tiny_models.engine(family)
    rule = dataclasses.replace(base.config.box, sparse=3.0)
    return QZoom(dataclasses.replace(base, config=base.config.replace(box=rule, **config)))


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "llava"])
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_left_out_tokens_leave_the_others_where_they_were(family, positions):
    base = tiny_models.engine(family)
    engine = dataclasses.replace(base, config=base.config.replace(positions=positions, box=RULE))
    backbone, clock = engine.backbone, Stopwatch(base.backbone.device)
    asked = request(engine, PAGE, QUESTION, zoom="always", region_threshold=0.0)
    item = coarse_pass(engine, [asked], clock)[0]
    cells = torch.zeros(item.state.prompt.spans[0].features.grid)
    cells[1, 0], cells[-2, -1] = 0.9, 0.8
    place = {"rule": RULE, "token_px": backbone.token_px, "padded": backbone.square_padding is not None}
    boxes = boxes_from_maps([cells], [PAGE.size], threshold=0.5, **place)  # type: ignore[arg-type]
    (after,), ((region,),) = zoom(engine, [dataclasses.replace(item, boxes=boxes)], clock)
    own = after.state.prompt
    features = own.spans[1].features
    assert features.kept is not None
    size = features.grid[0] * features.grid[1]
    assert 0 < len(features.kept) == region.tokens < size
    logits = prefill(engine, [after], clock)[0].logits
    torch.testing.assert_close(logits, full_pass(backbone, own), atol=1e-4, rtol=0)
    # the same crop read whole: the tokens that are read stand where they stood
    options = dataclasses.replace(asked.options, region_tokens=TokenBudget(size, size))
    whole = tuple(dataclasses.replace(box, foreground=None) for box in boxes)
    item = dataclasses.replace(item, request=dataclasses.replace(asked, options=options), boxes=whole)
    prompt = zoom(engine, [item], clock)[0][0].state.prompt
    start = own.spans[1].start
    stay = torch.ones(len(prompt), dtype=torch.bool)
    stay[start : start + size] = False
    stay[start + features.kept] = True
    assert torch.equal(own.ids, prompt.ids[stay])
    if family == "llava":  # its positions only count
        assert torch.equal(own.positions[0], torch.arange(len(own)))
    else:
        assert torch.equal(own.positions, prompt.positions[:, stay])


def test_batches_and_sessions_read_the_same_tokens():
    model = sparse("qwen3_vl")
    samples = [(tiny_models.picture(50 + i, 300, 220), QUESTION) for i in range(3)]
    options = {"zoom": "always", "region_threshold": 0.6, "max_new_tokens": 5}
    single = [model.ask(*sample, **options) for sample in samples]
    batch = model.ask_batch(samples, **options)
    session = [model.session(page).ask(text, **options) for page, text in samples]
    for one, *others in zip(single, batch, session, strict=True):
        assert [other.tokens for other in others] == [one.tokens] * 2
        assert [other.regions for other in others] == [one.regions] * 2
        assert one.usage.region_tokens == sum(region.tokens for region in one.regions)


def test_where_all_is_foreground_nothing_changes():
    own = tiny_models.engine("qwen3_vl")
    options = {"zoom": "always", "region_threshold": 0.0, "max_new_tokens": 6}
    wanted = QZoom(own).ask(PAGE, QUESTION, **options)
    answer = sparse("qwen3_vl").ask(PAGE, QUESTION, **options)
    assert (answer.tokens, answer.regions, answer.usage) == (wanted.tokens, wanted.regions, wanted.usage)


def test_two_ways_to_choose_tokens_are_refused():
    with pytest.raises(ConfigError, match="set one of them"):
        BoxRule(components="groups", too_many="mask", sparse=2)
    with pytest.raises(ConfigError, match="set one of them"):
        ZoomConfig(tokens_per_cell=2.0, box=RULE)
    with pytest.raises(ConfigError, match="set one of them"):
        ZoomConfig(tokens_per_cell=2.0, reread=RereadRule(layer=1, heads=(0,)))
    with pytest.raises(ConfigError, match=r"sparse must be a number from 1 to 8 or null, not 0\.5"):
        BoxRule(sparse=0.5)
