"""How far it is from a question to the first decoder layer, counted in frames of qzoom's own code."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import qzoom
from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.model import QZoom
from tests import tiny_models

PACKAGE = str(Path(qzoom.__file__).parent)
MOST_FRAMES = 5


def frames_to_first_layer(model: QZoom, ask: Any) -> list[str]:
    """Names of qzoom's frames between the caller and the first layer, outermost first."""
    names: list[str] = []

    def look(*_: Any) -> None:
        frame: FrameType | None = sys._getframe()
        stack = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append(frame.f_code.co_name)
            frame = frame.f_back
        if not names:
            names.extend(reversed(stack))

    handle = model.engine.backbone.layers[0].register_forward_pre_hook(look)
    try:
        ask()
    finally:
        handle.remove()
    return names


@pytest.fixture(scope="module")
def model():
    return QZoom(tiny_models.engine("qwen3_vl"))


def test_few_frames_lie_before_the_first_layer_whoever_asks(model):
    picture = tiny_models.picture(1)
    names = frames_to_first_layer(model, lambda: model.ask(picture, "what?", max_new_tokens=1))
    assert names == ["ask", "answer", "advance_shared", "run_layers", "run_layer"]
    assert len(names) <= MOST_FRAMES
    picture = tiny_models.picture(1)
    names = frames_to_first_layer(model, lambda: model.ask_batch([(picture, "what?")] * 2, max_new_tokens=1))
    assert "answer" in names
    request = model.request(picture, "what?", max_new_tokens=1)
    batch = ContinuousBatch(model.engine, cache=PrefixCache(2**24))
    names = frames_to_first_layer(model, lambda: list(batch.add({0: request}, {0: prefix_key(model.engine, request)})))
    assert "answer" in names
    session = model.session(picture)
    assert "answer" in frames_to_first_layer(model, lambda: session.ask("what?", max_new_tokens=1))
