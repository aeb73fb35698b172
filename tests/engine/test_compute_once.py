import dataclasses
from typing import Any

import pytest

from qzoom.engine.state import Engine
from qzoom.model import QZoom
from tests import tiny_models
from tests.flow import count_tokens

PAGE = tiny_models.picture(71, 320, 200)
QUESTION = "What is the total amount?"


def made(family: str, **more: Any) -> Engine:
    base = tiny_models.engine(family)
    return dataclasses.replace(base, config=base.config.replace(region_threshold=0.45, **more))


def parts(engine: Engine) -> dict[str, Any]:
    """The modules that count: whole layers of every stack, and the pieces of both branches' last layers."""
    assert engine.gate is not None
    assert engine.region is not None
    gate, region = engine.gate.layers[-1], engine.region.layers[-1]
    out = {f"layer{i}": layer for i, layer in enumerate(engine.backbone.layers)}
    out |= {f"gate{i}": layer for i, layer in enumerate(engine.gate.layers)}
    out |= {f"region{i}": layer for i, layer in enumerate(engine.region.layers)}
    for name, layer in (("gate", gate), ("region", region), ("top", engine.backbone.layers[-1])):
        attention = layer.self_attn
        out |= {f"{name}_{k}": getattr(attention, f"{k}_proj") for k in "qkvo"}
        out[f"{name}_mlp"] = layer.mlp
    return out


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_a_zoom_runs_only_what_is_new(family, positions):
    engine = made(family, positions=positions)
    model = QZoom(engine)
    with count_tokens(parts(engine)) as counts:
        answer = model.ask(PAGE, QUESTION, gate_threshold=0.0, max_new_tokens=1)
    assert answer.gate.zoomed
    usage = answer.usage
    whole = usage.prompt_tokens
    coarse_prompt = whole - usage.region_tokens - 2
    question = len(engine.backbone.tokenizer(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    for i in range(3):  # the coarse view, then region and question on the kept prefix
        assert counts[f"layer{i}"] == coarse_prompt + usage.region_tokens + 2 + question
    for i in range(3, tiny_models.LAYERS - 1):
        assert counts[f"layer{i}"] == whole
    assert [counts["gate0"], counts["gate1"]] == [coarse_prompt] * 2
    assert [counts["region0"], counts["region1"]] == [coarse_prompt] * 2
    # last layers: the gate's output and the answer's logits are needed of one token only
    for name, length in (("gate", coarse_prompt), ("top", whole)):
        assert counts[f"{name}_q"] == counts[f"{name}_o"] == counts[f"{name}_mlp"] == 1
        assert counts[f"{name}_k"] == counts[f"{name}_v"] == length
    # the region's last layer gives queries of the last and first token and keys of the coarse cells, nothing else
    assert counts["region_v"] == counts["region_o"] == counts["region_mlp"] == counts["region2"] == 0
    assert counts["region_q"] == 1 + (engine.config.sink == "first_token")
    assert counts["region_k"] == usage.coarse_tokens


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_only_what_is_needed_runs_without_a_zoom(family):
    engine = made(family)
    with count_tokens(parts(engine)) as counts:
        answer = QZoom(engine).ask(PAGE, QUESTION, gate_threshold=1.0, max_new_tokens=1)
    assert not answer.gate.zoomed
    length = answer.usage.prompt_tokens
    for i in range(tiny_models.LAYERS - 1):
        assert counts[f"layer{i}"] == length
    assert counts["gate0"] == length
    assert not any(n for name, n in counts.items() if name.startswith("region"))
    engine = made(family)
    with count_tokens(parts(engine)) as counts:
        answer = QZoom(engine).ask(PAGE, QUESTION, zoom="never", max_new_tokens=4)
    assert not any(n for name, n in counts.items() if name.startswith(("region", "gate")))
    # the token that ends the answer is drawn, never run
    assert counts["layer0"] == answer.usage.prompt_tokens + 3


def test_without_a_picture_neither_branch_runs():
    engine = made("qwen3_vl")
    with count_tokens(parts(engine)) as counts:
        answers = [QZoom(engine).ask(None, QUESTION, zoom=zoom, max_new_tokens=1) for zoom in ("auto", "always")]
    assert [a.gate.score for a in answers] == [None, None]
    assert not any(n for name, n in counts.items() if name.startswith(("region", "gate")))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("zoom", ["never", "always"])
def test_a_sessions_question_pays_for_its_text_and_region_only(family, zoom):
    engine = made(family)
    session = QZoom(engine).session(PAGE)
    session.ask("First?", zoom="always", max_new_tokens=2)
    vision = engine.backbone.model.model.visual
    with count_tokens(parts(engine)) as counts, count_calls(vision) as encoded:
        answer = session.ask(QUESTION, zoom=zoom, max_new_tokens=1)
    usage = answer.usage
    question = len(engine.backbone.tokenizer(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    if zoom == "never":
        assert usage.prompt_tokens - usage.reused_tokens == question
        assert {counts[f"layer{i}"] for i in range(tiny_models.LAYERS)} - {1} == {question}
        assert encoded == []
    else:
        inserted = usage.region_tokens + 2
        assert answer.gate.zoomed
        assert {counts[f"layer{i}"] for i in range(3)} == {question + inserted + question}
        assert {counts[f"layer{i}"] for i in range(3, tiny_models.LAYERS - 1)} == {inserted + question}
        assert [counts["region0"], counts["region_k"]] == [question, 0]
        assert len(encoded) == 1


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_batch_encodes_all_pictures_and_all_crops_at_once(family):
    engine = made(family)
    samples = [(tiny_models.picture(80 + i, 200 + 30 * i, 150), QUESTION) for i in range(4)]
    with count_calls(engine.backbone.model.model.visual) as encoded:
        answers = QZoom(engine).ask_batch(samples, zoom=["always", "never", "always", "never"], max_new_tokens=1)
    assert [a.gate.zoomed for a in answers] == [True, False, True, False]
    assert len(encoded) == 2


class count_calls:
    """The calls of a module inside the block, as a growing list."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> list[int]:
        calls: list[int] = []
        self.handle = self.module.register_forward_pre_hook(lambda *_: calls.append(1))
        return calls

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
