import dataclasses

import pytest
import torch

from qzoom.config import BoxRule, TokenBudget
from qzoom.errors import HeadsMissingError
from qzoom.images.geometry import contains
from qzoom.model import QZoom
from qzoom.types import GateDecision
from tests import tiny_models
from tests.flow import request, run
from tests.plain import full_pass, plain_generate

PAGE = tiny_models.picture(31, 400, 300)
WIDE = tiny_models.picture(32, 500, 90)
QUESTION = "What is the total amount?"
THREE = BoxRule(components="all", max_regions=3, threshold="relative", scaling="exact")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rule", [BoxRule(), THREE], ids=["one", "three"])
def test_the_kept_prefix_gives_what_a_full_pass_gives(family, positions, attn, rule):
    base = tiny_models.engine(family, attn=attn)
    engine = dataclasses.replace(base, config=base.config.replace(positions=positions, box=rule))
    threshold = 0.9 if rule.threshold == "relative" else 0.4
    asked = request(engine, [PAGE, WIDE], QUESTION, zoom="always", region_threshold=threshold)
    found = run(engine, [asked])[0]
    assert len(found.regions) >= 1
    torch.testing.assert_close(found.logits, full_pass(engine.backbone, found.after.state.prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("shared_layers", [1, 3])
def test_with_stock_positions_the_crop_is_a_second_picture(family, shared_layers):
    base = tiny_models.engine(family, shared_layers=shared_layers)
    engine = dataclasses.replace(base, config=base.config.replace(box=BoxRule(threshold="relative")))
    answer = QZoom(engine).ask(PAGE, QUESTION, zoom="always", region_threshold=0.9, max_new_tokens=10)
    assert answer.gate.zoomed
    crop = PAGE.crop(answer.regions[0].box)
    expected, _ = plain_generate(engine.backbone, [PAGE, crop], QUESTION, 10)
    assert list(answer.tokens) == expected


def test_usage_counts_every_token():
    engine = tiny_models.engine("qwen3_vl")
    asked = request(engine, [PAGE, WIDE], QUESTION, zoom="always", region_threshold=0.4)
    found = run(engine, [asked])[0]
    answer = QZoom(engine).ask([PAGE, WIDE], QUESTION, zoom="always", region_threshold=0.4, max_new_tokens=3)
    pads = int((found.after.state.prompt.ids == engine.backbone.image_token_id).sum())
    assert answer.usage.coarse_tokens + answer.usage.region_tokens == pads
    assert answer.usage.region_tokens == sum(r.tokens for r in answer.regions)
    assert answer.usage.prompt_tokens == len(found.after.state.prompt)
    assert answer.usage.prompt_tokens == len(found.before.state.prompt) + answer.usage.region_tokens + 2
    assert answer.usage.completion_tokens == 3
    assert answer.usage.reused_tokens == 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("shift", ["max", "min"])
def test_aligned_positions_lie_between_the_covered_cells(family, shift):
    base = tiny_models.engine(family)
    config = base.config.replace(positions="aligned", temporal_shift=shift)
    engine = dataclasses.replace(base, config=config)
    found = run(engine, [request(engine, PAGE, QUESTION, zoom="always", region_threshold=0.5)])[0]
    before, after = found.before.state.prompt, found.after.state.prompt
    coarse, region = after.spans
    x0, y0, x1, y1 = found.before.boxes[0].cells
    own = after.positions[:, region.start : region.stop].view(3, *region.features.grid)
    first = before.positions[:, coarse.start].float()
    side = max(coarse.features.grid) + 2 if shift == "max" else min(coarse.features.grid)
    assert own[0].unique().tolist() == [float(first[0]) + side]
    assert own[1].min() == first[1] + y0
    assert own[1].max() <= first[1] + y1 - 1
    assert own[2].min() == first[2] + x0
    assert own[2].max() <= first[2] + x1 - 1
    assert torch.equal(own[1][:, 0], own[1][:, -1])
    assert torch.equal(own[2][0], own[2][-1])
    # <vision_end> of the coarse block, then the region's own start and end, then the question further back
    end = before.positions[:, coarse.stop].float()
    grow = max(region.features.grid) + 2
    assert torch.equal(after.positions[:, region.start - 1], end + 1)
    assert torch.equal(after.positions[:, region.stop], end + grow)
    assert torch.equal(after.positions[:, region.stop + 1 :], before.positions[:, coarse.stop + 1 :].float() + grow)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_empty_map_gives_the_coarse_answer_and_says_so(family):
    model = QZoom(tiny_models.engine(family))
    plain = model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=8)
    answer = model.ask(PAGE, QUESTION, zoom="always", region_threshold=1.0, max_new_tokens=8)
    assert answer.tokens == plain.tokens
    assert answer.gate.zoomed is False
    assert "coarse pass" in answer.gate.note
    assert answer.regions == ()
    assert len(answer.heat_maps) == 1
    assert answer.heat_maps[0].values.max() < 1


def test_without_heads_auto_falls_back_with_a_note_and_always_is_refused():
    model = QZoom(tiny_models.engine("qwen3_vl", heads=False))
    assert not model.has_gate
    assert not model.has_region
    for call in (
        lambda: model.perceive(PAGE, QUESTION),
        lambda: model.ask(PAGE, QUESTION, zoom="always"),
        lambda: model.session(PAGE).ask(QUESTION, zoom="always"),
        lambda: model.ask_batch([(PAGE, QUESTION)], zoom="always"),
    ):
        with pytest.raises(HeadsMissingError, match=r'no region branch.*zoom "auto" or "never"'):
            call()
    expected, _ = plain_generate(model.engine.backbone, [PAGE], QUESTION, 6)
    assert list(model.ask(PAGE, QUESTION, zoom="never", max_new_tokens=6).tokens) == expected
    assert list(model.session(PAGE).ask(QUESTION, zoom="never", max_new_tokens=6).tokens) == expected
    for answer in (model.ask(PAGE, QUESTION, max_new_tokens=6), model.session(PAGE).ask(QUESTION, max_new_tokens=6)):
        assert list(answer.tokens) == expected
        assert answer.gate == GateDecision(
            None, None, False, "The model has no region branch, so the answer is from the coarse pass."
        )
    assert model.ask(None, QUESTION, max_new_tokens=1).gate.note == ""


def test_without_a_gate_auto_always_zooms():
    whole = tiny_models.engine("qwen2_5_vl")
    model = QZoom(dataclasses.replace(whole, gate=None))
    always = QZoom(whole).ask(PAGE, QUESTION, zoom="always", region_threshold=0.4, max_new_tokens=6)
    answer = model.ask(PAGE, QUESTION, region_threshold=0.4, max_new_tokens=6)
    assert answer.gate.zoomed
    assert answer.gate.score is None
    assert answer.tokens == always.tokens


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_text_question_after_a_zoomed_one_is_a_text_question(family):
    model = QZoom(tiny_models.engine(family))
    expected, _ = plain_generate(model.engine.backbone, [], "Hello, who are you?", 10)
    assert model.ask(PAGE, QUESTION, zoom="always", region_threshold=0.4, max_new_tokens=4).gate.zoomed
    for zoom in ("never", "auto", "always"):
        answer = model.ask(None, "Hello, who are you?", zoom=zoom, max_new_tokens=10)
        assert answer.gate.note == ("There is no picture to zoom into." if zoom == "always" else "")
        assert list(answer.tokens) == expected
        assert answer.gate.zoomed is False
        assert answer.regions == ()
        assert answer.usage.coarse_tokens == answer.usage.region_tokens == 0


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("size", [(640, 24), (24, 640)], ids=["one_row", "one_column"])
def test_maps_of_one_row_or_column_zoom(family, size):
    model = QZoom(tiny_models.engine(family))
    strip = tiny_models.picture(33, *size)
    answer = model.ask(strip, QUESTION, zoom="always", region_threshold=0.0, max_new_tokens=4, coarse_tokens=(4, 20))
    rows, columns = answer.heat_maps[0].values.shape
    assert 1 in (rows, columns)
    assert rows * columns == answer.usage.coarse_tokens
    assert answer.gate.zoomed
    assert contains((0, 0, *size), answer.regions[0].box)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_budgets_are_kept_by_the_look_and_by_all_regions_together(family):
    base = tiny_models.engine(family)
    engine = dataclasses.replace(base, config=base.config.replace(box=THREE, region_threshold=0.9))
    model = QZoom(engine)
    most = 0
    for seed in range(6):
        page = tiny_models.picture(100 + seed, 700, 500)
        answer = model.ask(
            page, QUESTION, zoom="always", coarse_tokens=(30, 60), region_tokens=(4, 9), max_new_tokens=2
        )
        assert 30 <= answer.usage.coarse_tokens <= 60
        assert 4 <= answer.usage.region_tokens <= 9
        most = max(most, len(answer.regions))
    assert most > 1


def test_budgets_fall_back_on_the_config_then_on_the_coarse_ones():
    base = tiny_models.engine("qwen3_vl")

    def tokens(coarse: TokenBudget | None, region: TokenBudget | None, **options: object) -> tuple[int, int]:
        config = base.config.replace(coarse_tokens=coarse, region_tokens=region, region_threshold=0.4)
        model = QZoom(dataclasses.replace(base, config=config))
        usage = model.ask(PAGE, QUESTION, zoom="always", max_new_tokens=1, **options).usage
        return usage.coarse_tokens, usage.region_tokens

    exact = {n: TokenBudget(n, n) for n in (6, 8, 12, 20)}
    assert tokens(exact[6], exact[8]) == (6, 8)
    assert tokens(exact[6], None) == (6, 6)
    assert tokens(exact[6], exact[8], coarse_tokens=(12, 12)) == (12, 8)
    assert tokens(exact[6], None, coarse_tokens=(12, 12)) == (12, 12)
    assert tokens(exact[6], exact[8], region_tokens=exact[20]) == (6, 20)


def test_of_more_regions_than_tokens_the_best_are_read():
    base = tiny_models.engine("qwen3_vl")
    engine = dataclasses.replace(base, config=base.config.replace(box=THREE, region_threshold=0.9))
    pages = [tiny_models.picture(100 + seed, 700, 500) for seed in range(6)]
    counts = [len(QZoom(engine).perceive(p, QUESTION, coarse_tokens=(30, 60)).regions) for p in pages]
    page = pages[counts.index(max(counts))]
    assert max(counts) > 1
    options = {"zoom": "always", "coarse_tokens": (30, 60), "max_new_tokens": 1}
    every = QZoom(engine).ask(page, QUESTION, **options)
    answer = QZoom(engine).ask(page, QUESTION, region_tokens=1, **options)
    assert [r.box for r in answer.regions] == [every.regions[0].box]
    assert answer.usage.region_tokens == 1


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_perceive_is_what_an_answer_would_do(family):
    model = QZoom(tiny_models.engine(family))
    outcomes = set()
    for i in range(6):
        page = tiny_models.picture(200 + i, 150 + 50 * i, 160)
        seen = model.perceive(page, QUESTION)
        answer = model.ask(page, QUESTION, max_new_tokens=1)
        assert seen.gate == answer.gate
        outcomes.add(answer.gate.zoomed)
        if answer.gate.zoomed:
            assert [r.box for r in seen.regions] == [r.box for r in answer.regions]
            assert (seen.heat_maps[0].values == answer.heat_maps[0].values).all()
        assert seen.image_sizes_px == (page.size,)
    assert outcomes == {True, False}
