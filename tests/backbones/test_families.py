import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qzoom.checkpoints.adapter import save_pretrained
from qzoom.checkpoints.convert import convert
from qzoom.checkpoints.load import load_engine
from qzoom.config import BoxRule
from qzoom.engine.batch import ContinuousBatch
from qzoom.engine.prefix_cache import PrefixCache, prefix_key
from qzoom.engine.state import Engine
from qzoom.errors import CheckpointError, ConfigError
from qzoom.heads.branches import new_region
from qzoom.model import QZoom
from qzoom.training.plan import sizes_of
from qzoom.training.stages import StageRecipe, named_parts
from qzoom.training.train_stage import train_stage
from qzoom.types import Answer
from tests import tiny_models
from tests.flow import request, run
from tests.plain import full_pass, plain_generate
from tests.training.conftest import make_world

NEW = [family for family in tiny_models.EVERY if family not in tiny_models.FAMILIES]
"""The first two families have tests of their own of all this in every room."""
PAGES = [tiny_models.picture(61, 300, 200), tiny_models.picture(62, 90, 260), tiny_models.picture(63, 400, 60)]
CHOICES: list[dict[str, Any]] = [
    {"zoom": "never"}, {"zoom": "always"}, {}, {"gate_threshold": 0.0}, {"zoom": "always", "region_threshold": 1.0},
]  # fmt: skip
QUESTIONS = ["What is the total?", "When?", "Who is the company, and what did they sell to whom?", "?", "When?"]

pytestmark = pytest.mark.parametrize("family", NEW, scope="module")


def made(family: str, positions: str = "second_image", attn: str = "sdpa", **more: Any) -> Engine:
    base = tiny_models.engine(family, attn=attn)
    return dataclasses.replace(
        base,
        config=base.config.replace(
            positions=positions, region_threshold=0.05 if family in tiny_models.GLM else 0.2, **more
        ),
    )


@dataclasses.dataclass(frozen=True)
class Saved:
    """Folders of a model, and what it answers to `zoomed`."""

    base: Path  # without branches
    own: Path  # with branches and base
    answer: Answer


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    engine, folder = made(family), tmp_path_factory.mktemp(family)
    base = save_pretrained(dataclasses.replace(engine, gate=None, region=None), folder / "base", include_base=True)
    return Saved(base, save_pretrained(engine, folder / "own", include_base=True), zoomed(engine))


def zoomed(engine: Engine) -> Answer:
    return QZoom(engine).ask(PAGES[0], "When?", zoom="always", max_new_tokens=8)


def assert_same(answer: Answer, expected: Answer) -> None:
    assert (answer.tokens, answer.gate.zoomed) == (expected.tokens, expected.gate.zoomed)
    assert [region.box for region in answer.regions] == [region.box for region in expected.regions]
    assert dataclasses.replace(answer.usage, reused_tokens=0) == dataclasses.replace(expected.usage, reused_tokens=0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_tokens_are_those_of_generate(family, count):
    model = QZoom(made(family))
    expected, _ = plain_generate(model.engine.backbone, PAGES[:count], "What is the total?", 12)
    assert list(model.ask(PAGES[:count], "What is the total?", zoom="never", max_new_tokens=12).tokens) == expected


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_a_zoom_on_the_kept_prefix_equals_a_full_pass(family, positions, attn):
    rule = BoxRule(components="all", max_regions=3, threshold="relative", scaling="exact")
    engine = made(family, positions, attn, box=rule)
    found = run(engine, [request(engine, PAGES[:2], QUESTIONS[0], zoom="always", region_threshold=0.9)])[0]
    assert len(found.regions) >= 1
    expected = full_pass(engine.backbone, found.after.state.prompt)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=0)


def test_queries_and_keys_give_the_attention_weights(family):
    backbone = made(family, attn="eager").backbone
    layer: Any = backbone.layers[backbone.attention_layers[0]]
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, tiny_models.HIDDEN)
    rotary = backbone.rotary(hidden, torch.randint(0, 20, (backbone.position_axes, 2, 9)))
    with torch.inference_mode():
        _, weights = layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
        query, key = backbone.query(layer, hidden, rotary), backbone.key(layer, hidden, rotary)
    groups = query.shape[1] // key.shape[1]
    own = (query @ key.repeat_interleave(groups, dim=1).mT * query.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(own, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["second_image", "aligned"])
def test_sessions_the_prefix_cache_and_batches_equal_fresh_calls(family, positions):
    engine = made(family, positions)
    model = QZoom(engine)
    fresh = [model.ask(PAGES[:2], q, max_new_tokens=6, **o) for q, o in zip(QUESTIONS, CHOICES, strict=True)]
    assert {answer.gate.zoomed for answer in fresh} == {True, False}
    session = model.session(PAGES[:2])
    for question, options, expected in zip(QUESTIONS, CHOICES, fresh, strict=True):
        assert_same(session.ask(question, max_new_tokens=6, **options), expected)
    batch = ContinuousBatch(engine, cache=PrefixCache(2**26))
    requests = {
        i: model.request(PAGES[:2], q, max_new_tokens=6, **o)
        for i, (q, o) in enumerate(zip(QUESTIONS, CHOICES, strict=True))
    }
    prefixes = {i: prefix_key(engine, one) for i, one in requests.items()}
    events = [*batch.add(requests, prefixes), *batch.run()]
    cached = {key: event.answer for key, event in events if event.answer is not None}
    for i, expected in enumerate(fresh):
        assert_same(cached[i], expected)
    assert cached[4].usage.reused_tokens > 0


def test_ragged_batches_and_streams_equal_single_calls(family):
    model = QZoom(made(family, "aligned"))
    samples = [(PAGES[i % 3] if i != 3 else None, question) for i, question in enumerate(QUESTIONS)]
    lengths = [3, 9, 1, 6, 5]
    spread = {
        name: [options.get(name, default) for options in CHOICES]
        for name, default in (("zoom", "auto"), ("gate_threshold", None), ("region_threshold", None))
    }
    together = model.ask_batch(samples, max_new_tokens=lengths, **spread)
    for sample, options, length, answer in zip(samples, CHOICES, lengths, together, strict=True):
        assert_same(answer, model.ask(*sample, max_new_tokens=length, **options))
    model = QZoom(made(family))
    events = list(model.stream(PAGES[0], "When?", zoom="always", max_new_tokens=8))
    assert "".join(event.text for event in events[1:-1]) == events[-1].answer.text


def test_saved_and_loaded_it_answers_the_same(family, saved, tmp_path):
    apart = save_pretrained(made(family), tmp_path / "apart", include_base=False, base_id=str(saved.base))
    for folder in (saved.own, apart):
        assert_same(zoomed(load_engine(folder, dtype="float32")), saved.answer)


def test_converted_to_a_merged_checkpoint_and_back_it_answers_the_same(family, saved, tmp_path):
    if family == "qwen3_5_moe":  # transformers writes its experts apart and reads them fused
        with pytest.raises(CheckpointError, match=r"experts fused .*converting is not supported for this family\.$"):
            convert(saved.own, tmp_path / "merged")
        return
    if family == "llava":  # the authors' layout names a published vision tower: tests/checkpoints/test_llava.py
        return
    assert convert(saved.own, tmp_path / "merged").written_kind == "upstream"
    assert convert(tmp_path / "merged", tmp_path / "back").written_kind == "adapter"
    for name in ("merged", "back"):
        assert_same(zoomed(load_engine(tmp_path / name, dtype="float32")), saved.answer)
    convert(saved.own, tmp_path / "plain", answer_only=True)
    assert load_engine(tmp_path / "plain", dtype="float32").region is None


@pytest.mark.slow
def test_two_steps_of_every_stage_move_what_they_should(family, tmp_path):
    world = make_world(family, tmp_path)
    moves = {"regions": {"region"}, "gate": {"gate"}, "answers": {"layers", "norm", "lm_head"}}
    for stage, labels in (("regions", "regions"), ("gate", "gate"), ("answers", "mined")):
        engine = load_engine(world / "base", dtype="float32")
        before = {name: weight.detach().clone() for name, (_, weight) in named_parts(engine).items()}
        recipe = StageRecipe(
            stage=stage, base=str(world / "base"), labels=(str(world / labels),), batch=4, micro_batch=2, steps=2,
            learning_rate=1e-3, precision="float32", trackers=(), region_tokens=40,
        )  # fmt: skip
        report = train_stage(recipe, tmp_path / stage, base=engine)
        assert report.steps == 2
        trained = named_parts(load_engine(tmp_path / stage / "model", dtype="float32"))
        moved = {part for name, (part, weight) in trained.items() if not torch.equal(weight, before[name])}
        assert moved == moves[stage]


def test_a_plan_that_would_be_wrong_is_refused(family, saved):
    if family == "llava":
        count = sum(weight.numel() for weight in made(family).backbone.model.parameters())
        assert sizes_of(saved.base).base == count
        return
    with pytest.raises(ConfigError, match="no training plan"):
        sizes_of(saved.base)


def test_a_map_needs_a_layer_with_queries_and_keys(family, saved, tmp_path):
    engine = made(family)
    if family not in tiny_models.HYBRIDS:
        assert engine.backbone.attention_layers == tuple(range(engine.backbone.num_layers))
        return
    assert engine.backbone.attention_layers == (3, 7)
    with pytest.raises(ConfigError, match=r"K=3 and T=3 .* linear-attention layer.*K \+ T out of 4, 8"):
        new_region(engine.backbone, 3, 3)
    assert [engine.backbone.nearest_depth(depth, 3) for depth in (1, 2, 3, 5, 7)] == [1, 1, 5, 5, 5]
    folder = Path(shutil.copytree(saved.own, tmp_path / "own"))
    config = folder / "qzoom_config.json"
    config.write_text(config.read_text().replace('"shared_layers": 5', '"shared_layers": 4'))
    with pytest.raises(CheckpointError, match="linear-attention layer"):
        load_engine(folder)
