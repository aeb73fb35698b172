import dataclasses
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qzoom.backbones.llava import LlavaBackbone
from qzoom.checkpoints.load import load_engine
from qzoom.config import BoxRule, TokenBudget
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.state import Engine, map_inputs
from qzoom.engine.zoom import check_positions
from qzoom.errors import BudgetError, CheckpointError, ConfigError, QuestionError
from qzoom.heads.boxes import boxes_from_maps
from qzoom.labels.find_heads import HeadSet, published_heads
from qzoom.labels.label_regions import region_labeller
from qzoom.labels.settings import LabelMapSettings, RegionRecipe
from qzoom.model import QZoom
from qzoom.settings import read_settings
from qzoom.store.schema import Question, RegionLabel, Turn
from qzoom.training.stages import load_stage_recipe, named_parts
from qzoom.training.train_stage import train_stage
from tests import tiny_models
from tests.flow import Run, request, run
from tests.training.conftest import make_world

RECIPES = Path(__file__).parents[2] / "recipes"
PAGE = tiny_models.picture(31, 400, 300)
WIDE = tiny_models.picture(32, 500, 90)
QUESTION = "What is the total amount?"
BOTH = BoxRule(components="groups", max_regions=2, min_cells=2, max_cells=20, widen_cells=3, min_side_px=1)
MASK = dataclasses.replace(BOTH, max_regions=1, too_many="mask")


def made(box: BoxRule = MASK, **more: Any) -> Engine:
    base = tiny_models.engine("llava")
    return dataclasses.replace(base, config=base.config.replace(box=box, **more))


def found(engine: Engine, pictures: Any, threshold: float) -> Run:
    return run(engine, [request(engine, pictures, QUESTION, zoom="always", region_threshold=threshold)])[0]


def full_pass(engine: Engine, one: Run) -> torch.Tensor:
    """Logits of transformers' own decoder over the whole longer prompt, from scratch."""
    prompt = one.after.state.prompt
    hidden = engine.backbone.embed(prompt.ids)
    for span in prompt.spans:
        hidden[span.start : span.stop] = span.features.tokens
    with torch.inference_mode():
        out = engine.backbone.model.model.language_model(inputs_embeds=hidden[None], use_cache=False)
        return engine.backbone.model.lm_head(out.last_hidden_state[0, -1])


@cache
def outcomes(box: BoxRule, *, wide: bool = False) -> dict[tuple[int, bool], tuple[float, Run]]:
    """A threshold and its run for every number of regions of the page, masked or not, that some threshold gives.

    Args:
        box: the rule of the regions.
        wide: whether the wide picture is shown after the page.
    """
    out: dict[tuple[int, bool], tuple[float, Run]] = {}
    for threshold in np.linspace(0.2, 0.8, 41).tolist():
        one = found(made(box), [PAGE, WIDE] if wide else PAGE, threshold)
        out.setdefault((len(one.regions), any(box.keep is not None for box in one.before.boxes)), (threshold, one))
    return out


def test_pictures_are_padded_with_the_mean_and_regions_stretched():
    backbone = tiny_models.engine("llava").backbone
    flat = Image.new("RGB", (40, 20), (250, 0, 0))
    pixels = backbone.pixels(flat, None)[0][0]
    assert pixels.shape == (3, 84, 84)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    padding = torch.tensor([(c / 255 - m) / s for c, m, s in zip((122, 116, 104), mean, std, strict=True)])
    torch.testing.assert_close(pixels[:, 0, 0], padding, atol=1e-5, rtol=0)
    assert pixels[0, 42, 42] > 1.8
    crop = backbone.crop(flat, (0, 0, 40, 10))
    assert crop.size == (84, 84)
    assert crop.getpixel((0, 0)) == crop.getpixel((83, 83)) == (250, 0, 0)


def test_the_square_of_a_long_strip_takes_little_memory(monkeypatch):
    backbone = tiny_models.engine("llava").backbone
    strip = Image.new("RGB", (2000, 100), (250, 0, 0))
    expected = backbone.pixels(strip, None)[0]
    squares: list[Any] = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *a: (squares.append(size), new(mode, size, *a))[1])
    monkeypatch.setattr("qzoom.backbones.llava._MOST_SIDE_PX", 500)
    torch.testing.assert_close(backbone.pixels(strip, None)[0], expected, atol=0.2, rtol=0)
    assert set(squares) == {(500, 500)}
    assert strip.size == (2000, 100)


def test_one_two_and_masked_crops_equal_a_full_pass():
    every = outcomes(MASK, wide=True) | outcomes(BOTH) | outcomes(MASK)
    assert {(1, False), (2, False), (1, True)} <= every.keys()
    for (count, masked), (_, one) in every.items():
        engine = made()
        torch.testing.assert_close(one.logits, full_pass(engine, one), atol=1e-4, rtol=0)
        regions = [span for span in one.after.state.prompt.spans if span.role == "region"]
        assert len(regions) == len(one.before.boxes) == count
        if masked and count == 1:
            assert 0 < one.regions[0].tokens < 36
        if not masked:
            assert all(region.tokens == 36 for region in one.regions)


def test_the_zoomed_answer_is_transformers_own_with_a_second_picture():
    engine = made(BOTH)
    threshold, one = outcomes(BOTH)[2, False]
    answer = QZoom(engine).ask(PAGE, QUESTION, zoom="always", region_threshold=threshold, max_new_tokens=8)
    assert [region.box for region in answer.regions] == [region.box for region in one.regions]
    inputs = plain_inputs_with(engine, [PAGE, *(engine.backbone.crop(PAGE, r.box) for r in answer.regions)])
    out = engine.backbone.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert list(answer.tokens) == out[0, inputs["input_ids"].shape[1] :].tolist()


def plain_inputs_with(engine: Engine, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """transformers' inputs for a prompt with one block of tokens of several pictures, nothing between them."""
    backbone = engine.backbone
    ids = ChatEncoder(backbone).encode(read_conversation([None], QUESTION))
    ids = [i for one in ids for i in ([one] * 36 * len(pictures) if one == backbone.image_token_id else [one])]
    pixels = torch.cat([backbone.pixels(picture, None)[0] for picture in pictures])
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "pixel_values": pixels}


def test_the_map_comes_after_the_branchs_own_norm_and_is_not_rotated():
    engine = made()
    assert engine.region is not None
    assert engine.region.norm is not None
    hidden = torch.randn(1, 5, tiny_models.HIDDEN)
    positions = torch.arange(5)[None, None]
    normed, (cosines, sines) = map_inputs(engine, hidden, positions)
    torch.testing.assert_close(normed, engine.region.norm(hidden))
    assert bool((cosines == 1).all())
    assert not bool(sines.any())
    layer = engine.region.layers[-1]
    query = engine.backbone.query(layer, normed, (cosines, sines))
    plain = layer.self_attn.q_proj(layer.input_layernorm(normed))
    torch.testing.assert_close(query.transpose(1, 2).flatten(2), plain)


def test_a_group_wholly_in_the_padding_is_never_read():
    values = torch.zeros(24, 24)
    values[2:4, 3:6] = 0.9  # above a picture of 640 x 200 px, which lies in rows 8.25 to 15.75
    values[10:12, 10:13] = 0.8
    boxes = boxes_from_maps([values], [(640, 200)], threshold=0.5, rule=BOTH, token_px=14, padded=True)
    assert [box.box for box in boxes] == [(266, 46, 346, 100)]
    alone = values.clone()
    alone[10:12] = 0
    assert boxes_from_maps([alone], [(640, 200)], threshold=0.5, rule=BOTH, token_px=14, padded=True) == ()
    masked = boxes_from_maps([values], [(640, 200)], threshold=0.5, rule=MASK, token_px=14, padded=True)
    assert masked[0].keep is None  # one group is left, so its crop is read whole


def test_a_map_that_is_high_only_in_the_padding_gives_the_coarse_answer(monkeypatch):
    engine = made()
    model = QZoom(engine)
    plain = model.ask(WIDE, QUESTION, zoom="never", max_new_tokens=6)

    def padding_only(logits: Any, *_: Any) -> Any:
        values = torch.full((6, 6), -9.0)
        values[0, 1:4] = 9.0
        return original(values.flatten(), None, (6, 6), engine.config)

    import qzoom.engine.perceive as perceive

    original = perceive.region_map
    monkeypatch.setattr(perceive, "region_map", padding_only)
    answer = model.ask(WIDE, QUESTION, zoom="always", region_threshold=0.3, max_new_tokens=6)
    assert (answer.tokens, answer.regions) == (plain.tokens, ())
    assert "coarse pass" in answer.gate.note


def test_a_tiny_picture_has_boxes_of_at_least_a_pixel():
    values = torch.zeros(24, 24)
    values[12:14, 12:14] = 0.9
    (box,) = boxes_from_maps([values], [(9, 9)], threshold=0.5, rule=BOTH, token_px=14, padded=True)
    x0, y0, x1, y1 = box.box
    assert 0 <= x0 < x1 <= 9
    assert 0 <= y0 < y1 <= 9


def test_text_before_the_picture_moves_the_map_with_it():
    engine = made()
    parts = [{"type": "text", "text": "Look at this first: "}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    one = run(engine, [request(engine, PAGE, messages, zoom="always", region_threshold=0.1)])[0]
    usual = run(engine, [request(engine, PAGE, QUESTION, zoom="always", region_threshold=0.1)])[0]
    span = one.after.state.prompt.spans[0]
    assert span.start > usual.after.state.prompt.spans[0].start
    with torch.inference_mode():
        hidden = engine.backbone.embed(one.before.state.prompt.ids)
        hidden[span.start : span.stop] = span.features.tokens
        model = engine.backbone.model.model.language_model
        states = model(inputs_embeds=hidden[None], output_hidden_states=True, use_cache=False).hidden_states[3][0]
    torch.testing.assert_close(one.before.state.hidden, states, atol=1e-5, rtol=0)
    keys = one.before.state.keys[0]
    assert keys.shape[1] == span.stop - span.start == 36


def test_two_pictures_both_zoom_and_batches_of_unequal_blocks_equal_single_calls():
    engine = made()
    every = outcomes(MASK, wide=True)
    assert any(count == 2 for count, _ in every)  # one region of each picture
    one = next(run for (count, _), (_, run) in every.items() if count == 2)
    assert [region.image for region in one.regions] == [0, 1]
    samples: list[tuple[Any, float]] = [([PAGE, WIDE], threshold) for threshold, _ in every.values()]
    samples += [(PAGE, threshold) for threshold, _ in outcomes(MASK).values()]
    requests = [request(engine, p, QUESTION, zoom="always", region_threshold=t) for p, t in samples]
    together = run(engine, requests)
    alone = [run(engine, [one])[0] for one in requests]
    for mine, single in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.logits, single.logits, atol=1e-4, rtol=0)
        assert [r.box for r in mine.regions] == [r.box for r in single.regions]
    assert len({sum(r.tokens for r in one.regions) for one in alone}) > 1


def test_what_would_be_wrong_is_refused():
    model = QZoom(made())
    for question in ("<image>\nWhat is it?", "What is it? <image>"):
        with pytest.raises(QuestionError, match=r"pictures are given beside the text.*leave <image> out"):
            model.ask(PAGE, question)
    assert model.ask(PAGE, "What does <image> mean?", zoom="never", max_new_tokens=1).usage.coarse_tokens == 36
    model = QZoom(made())
    for limits in ({"coarse_tokens": TokenBudget(1, 20)}, {"zoom": "always", "region_tokens": TokenBudget(40, 99)}):
        with pytest.raises(BudgetError, match="every picture and region as 36 visual tokens"):
            model.ask(PAGE, QUESTION, **limits)
    with pytest.raises(ConfigError, match="margin_cells"):
        BoxRule(components="groups", too_many="mask", margin_cells=1)
    with pytest.raises(ConfigError, match="Training a student does not work with models that pad pictures"):
        made().backbone.need_bare_grid("Training a student")
    tiny_models.engine("qwen3_vl").backbone.need_bare_grid("Training a student")
    aligned = made().config.replace(positions="aligned")
    for backbone, refused in ((made().backbone, True), (tiny_models.engine("qwen3_vl").backbone, False)):
        with pytest.raises(ConfigError, match="'llava' count positions along one axis") if refused else nullcontext():
            check_positions(backbone, aligned)
    assert LlavaBackbone.released_layout({"model_type": "llava"}) is None
    with pytest.raises(CheckpointError, match="mm_projector_type='linear'"):
        LlavaBackbone.released_layout({"mm_vision_tower": "x", "mm_projector_type": "linear"})


def test_maps_show_the_picture_without_its_padding():
    answer = QZoom(made()).perceive(WIDE, QUESTION)
    assert answer.heat_maps[0].values.shape == (2, 6)  # 500 x 90 px in a map of 6 x 6


def test_llamas_tokenizer_gets_the_release_pieces():
    vocabulary = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", ":", "\n", "U", "A"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = (
        "{%- for m in messages -%}{{- m.role[0] | upper + ':' -}}{%- if m.content is string -%}{{- m.content -}}"
        "{%- else -%}{%- for p in m.content -%}{{- '<image>\n' if p.type == 'image' else p.text -}}{%- endfor -%}"
        "{%- endif -%}{{- '</s>' if m.role == 'assistant' -}}{%- endfor -%}"
    )

    class Stand:
        image_token_id = 10
        placeholder = "<image>"
        chat_template = template

    stand: Any = Stand()
    stand.tokenizer = tokenizer
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "a</s>"},
    ]
    ids = ChatEncoder(stand).encode(read_conversation([None], turns))
    shown = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    # every piece around the picture begins with the blank, the turn after the end token does not
    assert shown[:9] == ["▁", "U", ":", "b", "<image>", "▁", "\n", "a", "A"]
    assert shown[9:14] == [":", "b", "</s>", "U", ":"]
    assert shown[14:] == ["a", "<unk>", "<unk>", "<unk>", "<unk>"]


def test_a_template_that_sees_parts_only_loses_no_text():
    parts_only = (
        "{%- for m in messages -%}{{- m.role | upper + ': ' -}}"
        "{%- for p in m.content | selectattr('type', 'equalto', 'image') -%}{{- '<image>\n' -}}{%- endfor -%}"
        "{%- for p in m.content | selectattr('type', 'equalto', 'text') -%}{{- p.text + ' ' -}}{%- endfor -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
    )
    base = made().backbone
    backbone = type(base)(base.model, base.tokenizer, base.image_processor, parts_only)
    turns = [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "Yes."}]
    conversation = read_conversation(None, [*turns, {"role": "user", "content": "And then?"}])
    shown = base.tokenizer.decode(ChatEncoder(backbone).encode(conversation))
    assert shown == "USER: First? ASSISTANT: Yes. USER: And then? ASSISTANT:"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_recipes_train_two_steps(size, world, tmp_path):
    for stage, part in (("regions", "region"), ("gate", "gate")):
        path = RECIPES / f"llava-1.5-{size}" / f"{stage}.yaml"
        changes = {
            "base": str(world / "base"), "labels": [str(world / stage)], "batch": 4, "micro_batch": 2, "steps": 2,
        }  # fmt: skip
        changes |= {"precision": "float32", "trackers": [], "learning_rate": 1e-3}
        recipe = load_stage_recipe(path, stage, changes)
        if stage == "regions":
            assert (recipe.shared_layers, recipe.branch_layers, recipe.betas) == (15, 3, (0.9, 0.98))
            assert load_stage_recipe(path, stage).learning_rate == 5e-5
            if size == "13b":
                recipe = dataclasses.replace(recipe, region_loss="focal")
        engine = load_engine(world / "base", dtype="float32")
        before = {name: weight.detach().clone() for name, (_, weight) in named_parts(engine).items()}
        report = train_stage(recipe, tmp_path / stage, base=engine)
        assert (report.steps, report.last_loss > 0) == (2, True)
        trained = named_parts(load_engine(tmp_path / stage / "model", dtype="float32"))
        moved = {name for name, (_, weight) in trained.items() if not torch.equal(weight, before[name])}
        assert {name.split(".")[0] for name in moved} == {part}
        assert ("region.norm.weight" in moved) == (stage == "regions")


def test_labels_by_the_release_rules(tmp_path):
    recipe = read_settings(RegionRecipe, RECIPES / "labels" / "llava-1.5.yaml")
    assert recipe.maps == LabelMapSettings(
        sink_threshold=1e-3, foreground=0.2, background=0.1, blur_cells=0, min_peak=0.0
    )
    for sizes, count, sinks in (((4096, 32), 3, 32), ((5120, 40), 7, 2)):
        heads = published_heads(LlavaBackbone, *sizes, "natural")
        assert heads is not None
        assert (len(heads.pointing), len(heads.sinks)) == (count, sinks)
    tiny_models.picture(0, 200, 80).save(tmp_path / "0.png")
    turn = Turn("What?", ("x",), ((0, 0, 200, 80),))
    question = Question("a", "0.png", (turn,), "natural", "set", str(tmp_path))
    engine = made()
    heads = HeadSet(((2, 1), (4, 3)), ((1, 0),))
    easy = dataclasses.replace(recipe, tokens=36, max_new_tokens=4)
    records = region_labeller(engine, recipe=easy, heads={"natural": heads})(question)
    label, tensors = next((record, tensors) for record, tensors in records if isinstance(record, RegionLabel))
    assert (label.view, label.size_px, label.prompt) == ("dynamic", (200, 80), "What?")
    assert tensors["labels"].shape == (6, 6)
    known = region_labeller(engine, recipe=dataclasses.replace(easy, source="boxes"), heads={})(
        dataclasses.replace(question, turns=(dataclasses.replace(turn, boxes=((0, 0, 40, 40),)),))
    )
    cells = next(tensors for record, tensors in known if isinstance(record, RegionLabel))["labels"] == 1
    assert cells[:2].sum() == cells[4:].sum() == 0  # the padding above and below
    assert cells[2:4, :2].any()
