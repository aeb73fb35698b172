import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from qzoom.engine.flow import coarse_pass
from qzoom.engine.perceive import Stopwatch, token_doubt
from qzoom.model import QZoom
from tests import tiny_models
from tests.flow import count_tokens, request
from tests.plain import full_pass

PAGES = [tiny_models.picture(41 + i, 200 + 60 * i, 160) for i in range(3)]
QUESTION = "What is the total amount?"


def decided(by: str, family: str = "qwen3_vl", tokens: int = 4, **parts: Any) -> QZoom:
    base = tiny_models.engine(family)
    config = base.config.replace(decide_by=by, answer_tokens=tokens)
    return QZoom(dataclasses.replace(base, config=config, **parts))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_maps_peak_decides_without_a_gate(family):
    model = decided("map", family, gate=None)
    assert model.has_gate
    seen = model.perceive(PAGES, QUESTION)
    cells = np.concatenate([one.values.ravel() for one in seen.heat_maps])
    assert seen.gate.score == pytest.approx(1 - cells.mean() / cells.max(), abs=1e-6)
    score = seen.gate.score
    assert score is not None
    plain = model.ask(PAGES, QUESTION, zoom="never", max_new_tokens=5)
    always = model.ask(PAGES, QUESTION, zoom="always", max_new_tokens=5)
    for threshold, wanted in ((score - 1e-4, always), (score + 1e-4, plain)):
        answer = model.ask(PAGES, QUESTION, gate_threshold=threshold, max_new_tokens=5)
        assert (answer.gate.threshold, answer.gate.note) == (threshold, "")
        assert answer.gate.score == pytest.approx(score, abs=1e-6)
        assert answer.gate.zoomed == wanted.gate.zoomed
        assert (answer.tokens, answer.regions) == (wanted.tokens, wanted.regions)
    assert plain.gate.score is None


@pytest.mark.parametrize("by", ["gate", "map", "answer"])
def test_a_text_without_pictures_has_nothing_to_decide(by):
    seen = decided(by).perceive(None, QUESTION)
    assert (seen.gate.zoomed, seen.regions, seen.heat_maps) == (False, (), ())
    assert decided(by).ask(None, QUESTION, max_new_tokens=3).regions == ()


@pytest.mark.parametrize("by", ["map", "answer"])
def test_batches_sessions_and_single_questions_decide_alike(by):
    model = decided(by)
    samples = [(page, text) for page in PAGES for text in (QUESTION, "When?")]
    scores = sorted(model.perceive(*sample).gate.score or 0.0 for sample in samples)
    threshold = (scores[2] + scores[3]) / 2
    options = {"gate_threshold": threshold, "max_new_tokens": 5}
    single = [model.ask(*sample, **options) for sample in samples]
    batch = model.ask_batch(samples, **options)
    for own, (page, text), wanted in zip(batch, samples, single, strict=True):
        session = model.session(page).ask(text, **options)
        for answer in (own, session):
            assert (answer.tokens, answer.gate.zoomed) == (wanted.tokens, wanted.gate.zoomed)
            assert answer.gate.score == pytest.approx(wanted.gate.score, abs=1e-5)
    assert {answer.gate.zoomed for answer in single} == {True, False}


def test_doubt_of_a_token_by_hand():
    logits = torch.tensor([4.0, 1.0, 1.0, -90.0])
    # of the three highest: mean 2, deviation sqrt(2), so the first is sqrt(2) deviations above
    assert token_doubt(logits, 3) == pytest.approx(1 / (1 + math.exp(2**0.5)), abs=1e-5)
    assert token_doubt(torch.full((9,), 3.0)) == pytest.approx(0.5)
    one = torch.full((500,), -1.0)
    one[7] = 1.0
    assert token_doubt(one) == pytest.approx(1 / (1 + math.exp(63**0.5)), abs=1e-5)  # the most that 64 allow


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_least_certain_of_the_first_tokens_decides(family, tokens):
    model = decided("answer", family, tokens, gate=None)
    assert model.has_gate
    plain = model.ask(PAGES[0], QUESTION, zoom="never", max_new_tokens=tokens, ignore_eos=True)
    backbone = model.engine.backbone
    asked = request(model.engine, PAGES[0], QUESTION, zoom="never")
    prompt, doubts = coarse_pass(model.engine, [asked], Stopwatch(backbone.device))[0].state.prompt, []
    for token in plain.tokens:
        logits = full_pass(backbone, prompt)
        assert int(logits.argmax()) == token
        doubts.append(token_doubt(logits))
        prompt = prompt.with_token(token)
    assert len(doubts) == tokens
    score = model.perceive(PAGES[0], QUESTION).gate.score
    assert score == pytest.approx(max(doubts), abs=1e-5)
    always = model.ask(PAGES[0], QUESTION, zoom="always", max_new_tokens=6)
    coarse = model.ask(PAGES[0], QUESTION, zoom="never", max_new_tokens=6)
    for threshold, wanted in ((max(doubts) - 1e-3, always), (max(doubts) + 1e-3, coarse)):
        answer = model.ask(PAGES[0], QUESTION, gate_threshold=threshold, max_new_tokens=6)
        assert (answer.tokens, answer.regions) == (wanted.tokens, wanted.regions)


def test_what_the_coarse_answer_computed_is_used_again():
    model = decided("answer", tokens=1)
    backbone = model.engine.backbone
    upper = {"upper": backbone.layers[-2]}
    length = model.ask(PAGES[0], QUESTION, zoom="never", max_new_tokens=1).usage.prompt_tokens
    with count_tokens(upper) as counts:
        model.ask(PAGES[0], QUESTION, gate_threshold=1.0, max_new_tokens=1)
    assert counts["upper"] == length
    with count_tokens(upper) as counts:
        zoomed = model.ask(PAGES[0], QUESTION, gate_threshold=0.0, max_new_tokens=1)
    question = length - model.session(PAGES[0]).prefix.shared.length
    assert counts["upper"] == zoomed.usage.prompt_tokens + question
