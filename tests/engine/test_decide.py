"""What decides whether to zoom in place of the gate: the region map."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qzoom.model import QZoom
from tests import tiny_models

PAGES = [tiny_models.picture(41 + i, 200 + 60 * i, 160) for i in range(3)]
QUESTION = "What is the total amount?"


def by_map(family: str = "qwen3_vl", **parts: None) -> QZoom:
    base = tiny_models.engine(family)
    return QZoom(dataclasses.replace(base, config=base.config.replace(decide_by="map"), **parts))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_maps_peak_decides_without_a_gate(family: str) -> None:
    model = by_map(family, gate=None)
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


def test_batches_sessions_and_single_questions_decide_alike() -> None:
    model = by_map()
    samples = [(page, text) for page in PAGES for text in (QUESTION, "When?")]
    threshold = sorted(model.perceive(*sample).gate.score or 0.0 for sample in samples)[3]
    options = {"gate_threshold": threshold, "max_new_tokens": 5}
    single = [model.ask(*sample, **options) for sample in samples]
    batch = model.ask_batch(samples, **options)
    for own, (page, text), wanted in zip(batch, samples, single, strict=True):
        session = model.session(page).ask(text, **options)
        for answer in (own, session):
            assert answer.tokens == wanted.tokens
            assert answer.gate.zoomed == wanted.gate.zoomed
            assert answer.gate.score == pytest.approx(wanted.gate.score, abs=1e-5)
    assert {answer.gate.zoomed for answer in single} == {True, False}
