import dataclasses
import json
import math
import random
from typing import Any

import pytest
import torch

from qzoom.backbones.packed import _lower_right
from qzoom.config import BoxRule
from qzoom.engine.batch import events
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import DecodeBatch, prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.zoom import zoom
from qzoom.errors import CheckpointError, ConfigError, LengthError
from qzoom.model import QZoom
from qzoom.types import Answer, SamplingParams
from tests import tiny_models
from tests.flow import request, run

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First?"}]},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And the second, is it larger than the first one or smaller?"},
]
# (picture, question, options): sizes, lengths, counts of pictures and outcomes all differ
SAMPLES: list[tuple[Any, Any, dict[str, Any]]] = [
    (tiny_models.picture(1, 200, 140), "What is the total?", {}),
    (tiny_models.picture(2, 90, 300), "When was it, and where? Answer in one word.", {}),
    ([tiny_models.picture(3, 60, 60), tiny_models.picture(4, 410, 80)], "Which is wider?", {"zoom": "always"}),
    (None, "Hello, who are you?", {}),
    (tiny_models.picture(5, 330, 200), "Who is the company?", {"zoom": "never"}),
    (tiny_models.picture(6, 640, 24), "How many?", {"zoom": "always", "region_threshold": 0.2}),
    (tiny_models.picture(7, 128, 128), CHAT, {"zoom": "always", "region_threshold": 1.0}),
    (tiny_models.picture(8, 500, 400), "?", {"gate_threshold": 0.0}),
    (tiny_models.picture(9, 250, 250), "What is left of the blue square?", {"gate_threshold": 1.0}),
]


def made(family: str, positions: str, attn: str = "sdpa", **more: Any) -> Any:
    base = tiny_models.engine(family, attn=attn)
    config = base.config.replace(positions=positions, region_threshold=0.45, **more)
    return dataclasses.replace(base, config=config)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_first_logits_gate_maps_and_boxes_equal_the_single_ones(family, positions, attn):
    engine = made(family, positions, attn)
    requests = [request(engine, image, question, **options) for image, question, options in SAMPLES]
    alone = [run(engine, [one])[0] for one in requests]
    order = list(range(len(requests)))
    random.Random(3).shuffle(order)
    together = run(engine, [requests[i] for i in order])
    zoomed = {True: 0, False: 0}
    for i, found in zip(order, together, strict=True):
        expected = alone[i]
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        assert found.logits.argmax() == expected.logits.argmax()
        assert found.after.gate.zoomed == expected.after.gate.zoomed
        assert found.after.gate.note == expected.after.gate.note
        assert [r.box for r in found.regions] == [r.box for r in expected.regions]
        assert (found.after.gate.score is None) == (expected.after.gate.score is None)
        if found.after.gate.score is not None:
            assert found.after.gate.score == pytest.approx(expected.after.gate.score, abs=1e-5)
        for one, other in zip(found.after.maps, expected.after.maps, strict=True):
            torch.testing.assert_close(one.blurred, other.blurred, atol=1e-5, rtol=0)
        zoomed[found.after.gate.zoomed] += 1
    assert zoomed[True] >= 3
    assert zoomed[False] >= 3


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(("positions", "packed_tokens"), [("second_image", 2048), ("aligned", 70)])
def test_answers_equal_the_single_ones(family, positions, packed_tokens, monkeypatch):
    monkeypatch.setattr("qzoom.engine.layers._CPU_TOKENS", packed_tokens)
    model = QZoom(made(family, positions))
    lengths = [3, 9, 1, 14, 6, 9, 2, 11, 5]
    spread = {
        name: [options.get(name, default) for _, _, options in SAMPLES]
        for name, default in (("zoom", "auto"), ("gate_threshold", None), ("region_threshold", None))
    }
    together = model.ask_batch([(i, q) for i, q, _ in SAMPLES], max_new_tokens=lengths, **spread)
    for (image, question, options), length, found in zip(SAMPLES, lengths, together, strict=True):
        alone = model.ask(image, question, max_new_tokens=length, **options)
        assert (found.tokens, found.text, found.usage) == (alone.tokens, alone.text, alone.usage)
        assert found.finish_reason == alone.finish_reason
        assert [r.box for r in found.regions] == [r.box for r in alone.regions]
        assert found.image_sizes_px == alone.image_sizes_px


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_several_regions_in_a_batch_equal_the_single_ones(family):
    rule = BoxRule(components="all", max_regions=3, threshold="relative", scaling="exact", margin_cells=0.5)
    model = QZoom(made(family, "aligned", box=rule))
    samples = [(tiny_models.picture(40 + i, 300 + 50 * i, 260), f"Question {i}?") for i in range(5)]
    options = {"zoom": "always", "region_threshold": 0.9, "coarse_tokens": 48, "region_tokens": 20, "max_new_tokens": 6}
    together = model.ask_batch(samples, **options)
    assert max(len(a.regions) for a in together) > 1
    for sample, found in zip(samples, together, strict=True):
        alone = model.ask(*sample, **options)
        assert (found.tokens, found.usage) == (alone.tokens, alone.usage)
        assert [(r.box, r.tokens, r.image) for r in found.regions] == [
            (r.box, r.tokens, r.image) for r in alone.regions
        ]


def test_each_sample_draws_from_its_own_generator():
    model = QZoom(made("qwen3_vl", "second_image"))
    options = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 8}
    seeds = [11, 12, 11, 13, 11]
    samples = [(tiny_models.picture(1, 200, 140), "What is it?")] * len(seeds)
    together = model.ask_batch(samples, seed=seeds, **options)
    alone = [model.ask(*samples[0], seed=seed, **options) for seed in seeds]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert together[0].tokens == together[2].tokens == together[4].tokens
    assert len({a.tokens for a in together}) == 3


def test_one_cancelled_answer_leaves_the_others_alone():
    engine = made("qwen2_5_vl", "second_image")
    sampling = SamplingParams(max_new_tokens=10)
    requests = [request(engine, image, question, sampling=sampling, **o) for image, question, o in SAMPLES[:4]]
    answers = {}
    asked = {2: 0}

    def cancel(key: int) -> bool:
        if key == 2:
            asked[2] += 1
        return key == 2 and asked[2] == 4

    for key, event in events(engine, requests, cancel=cancel):
        if event.answer:
            answers[key] = event.answer
    assert sorted(answers) == [0, 1, 2, 3]
    assert (answers[2].finish_reason, len(answers[2].tokens)) == ("cancelled", 4)
    for key in (0, 1, 3):
        alone = next(e.answer for _, e in events(engine, [requests[key]]) if e.answer)
        assert answers[key].tokens == alone.tokens
        assert answers[key].finish_reason == "length"
    whole = next(e.answer for _, e in events(engine, [requests[2]]) if e.answer)
    assert answers[2].tokens == whole.tokens[:4]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_rows_may_join_a_running_batch(family):
    engine = made(family, "aligned")
    sampling = SamplingParams(max_new_tokens=9)
    requests = [request(engine, image, question, sampling=sampling, **o) for image, question, o in SAMPLES[:5]]
    alone = [next(e.answer for _, e in events(engine, [one]) if e.answer) for one in requests]
    clock = Stopwatch(engine.backbone.device)
    looks, _ = zoom(engine, coarse_pass(engine, requests, clock), clock)
    rows = prefill(engine, looks, clock)
    batch = DecodeBatch(engine.backbone)
    for arriving in (rows[:2], rows[2:3], rows[3:]):
        batch.start(arriving)
        batch.step()
        batch.step()
    assert len(batch.rows) == 5
    while batch.rows:
        batch.step()
    assert [tuple(row.tokens) for row in rows] == [answer.tokens for answer in alone]
    assert [row.stream.text for row in rows] == [answer.text for answer in alone]


def assert_equal(found: Answer, alone: Answer) -> None:
    assert (found.text, found.tokens, found.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
    assert [r.box for r in found.regions] == [r.box for r in alone.regions]
    assert dataclasses.replace(found.usage, reused_tokens=0) == alone.usage
    assert found.gate.zoomed == alone.gate.zoomed


@pytest.mark.parametrize("memory_mib", [None, 1])
def test_a_batch_looks_once_at_each_picture_and_runs_what_fits_into_memory(memory_mib):
    model = QZoom(made("qwen3_vl", "aligned"))
    pages = [tiny_models.picture(20 + i, 150 + 60 * i, 140) for i in range(3)]
    samples = [(pages[i % 3].copy(), f"What is {i // 3}?") for i in range(12)]
    shapes: list[tuple[int, int]] = []
    patches: list[int] = []
    hooks = [
        model.engine.backbone.layers[0].register_forward_pre_hook(
            lambda _, args: shapes.append(tuple(args[0].shape[:2]))
        ),
        model.engine.backbone.vision_tower.patch_embed.register_forward_pre_hook(
            lambda _, args: patches.append(len(args[0]))
        ),
    ]
    together = model.ask_batch(samples, max_new_tokens=5, zoom="never", memory_mib=memory_mib)
    for hook in hooks:
        hook.remove()
    assert sum(patches) == 4 * sum(together[i].usage.coarse_tokens for i in range(3))
    new = [answer.usage.prompt_tokens - answer.usage.reused_tokens for answer in together]
    packed = [new[0], new[3]] if memory_mib else [sum(new[:3]), sum(new[3:])]  # questions packed, by picture first
    assert [tokens for _, tokens in shapes if tokens > 1][:2] == packed
    assert max(rows for rows, _ in shapes) == (1 if memory_mib else 12)
    assert [answer.usage.reused_tokens > 0 for answer in together] == [False] * 3 + [True] * 9
    assert len({id(answer.images[0]) for answer in together}) == 3
    for sample, found in zip(samples, together, strict=True):
        assert_equal(found, model.ask(*sample, max_new_tokens=5, zoom="never"))
    for sample, found in zip(samples, model.ask_batch(samples, max_new_tokens=5, memory_mib=memory_mib), strict=True):
        assert_equal(found, model.ask(*sample, max_new_tokens=5))


def test_an_answer_that_does_not_fit_is_numbered():
    model = QZoom(made("qwen3_vl", "second_image"))
    samples = [(tiny_models.picture(1, 200, 140), "What is it?")] * 3
    with pytest.raises(LengthError, match=r"Sample 2: The prompt takes \d+ tokens") as caught:
        model.ask_batch(samples, max_new_tokens=[1, 4096, 1])
    assert caught.value.numbers[1:] == (4096, 4096)
    with pytest.raises(LengthError, match=r"Sample 3: The prompt takes \d+ tokens"):  # known once it zooms
        model.ask_batch(samples, zoom="always", region_tokens=[4, 4, (3500, 3600)], max_new_tokens=[2, 2, 590])
    with pytest.raises(ConfigError, match="memory_mib must be a whole number of at least 1, not 0"):
        model.ask_batch(samples, memory_mib=0)


def test_logits_that_are_no_numbers_end_one_answer_and_not_its_neighbours():
    engine = made("qwen3_vl", "second_image")
    sampling = SamplingParams(max_new_tokens=8)
    requests = [request(engine, image, q, sampling=sampling, zoom="never") for image, q, _ in SAMPLES[:4]]
    alone = [next(e.answer for _, e in events(engine, [one]) if e.answer) for one in requests]
    only = next(t for t in alone[1].tokens[1:4] if all(t not in a.tokens for a in (alone[0], *alone[2:])))
    assert all(only not in one.ids for one in requests)
    weight = engine.backbone.embedding.weight
    before = weight[only].clone()
    weight[only] = torch.nan
    try:
        last = {key: event for key, event in events(engine, requests) if event.kind in ("answer", "error")}
        with pytest.raises(CheckpointError, match="not a number"):
            QZoom(engine).ask(*SAMPLES[1][:2], max_new_tokens=8, zoom="never")
        with pytest.raises(CheckpointError, match="Sample 2: The model's output is not a number"):
            QZoom(engine).ask_batch([(i, q) for i, q, _ in SAMPLES[:4]], max_new_tokens=8, zoom="never")
    finally:
        weight[only] = before
    assert isinstance(last[1].error, CheckpointError)
    assert [last[key].answer.tokens for key in (0, 2, 3)] == [alone[key].tokens for key in (0, 2, 3)]


@pytest.mark.parametrize("part", ["gate", "region"])
def test_a_score_or_map_that_is_no_number_is_none_with_a_note(part):
    engine = made("qwen3_vl", "second_image")
    model = QZoom(engine)
    page, question = SAMPLES[0][:2]
    expected = model.ask(page, question, zoom="never", max_new_tokens=4)
    weight = getattr(engine, part).layers[1].self_attn.v_proj.weight
    before = weight.clone()
    weight[0, 0] = torch.nan
    try:
        answer = model.ask(page, question, gate_threshold=0.0, max_new_tokens=4)
        seen = model.perceive(page, question)
    finally:
        weight.copy_(before)
    assert (answer.tokens, answer.regions) == (expected.tokens, ())
    assert "is not a number (NaN or infinity), so the answer is from the coarse pass" in answer.gate.note
    assert (answer.gate.score is None) == (part == "gate")
    assert not answer.gate.zoomed
    assert answer.gate.note == seen.gate.note
    assert bool(seen.regions) == bool(seen.heat_maps) == (part == "gate")
    json.dumps([answer.to_dict(heat_map=True), seen.to_dict(heat_map=True)], allow_nan=False)


@torch.inference_mode()
def test_a_mask_that_is_used_again_serves_gradients_too():
    mask = _lower_right(2, 4, torch.float32, torch.device("cpu"))
    assert mask[0, 0].tolist() == [[0, 0, 0, -math.inf], [0, 0, 0, 0]]
    assert not mask.is_inference()
