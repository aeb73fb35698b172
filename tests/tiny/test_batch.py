import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tiny.aux_losses import GuidedModel, GuideWeights, count_targets, line_loss
from tiny.batch import GLYPHS, IGNORE, SLOTS, Example, Glyphs, Query, ReadLine, collate, glyph_classes, split_pool
from tiny.model import TinyArchitecture, build_tiny, use_fast_kernels
from tiny.render_views import fit_to_tokens, patchify
from tiny.tokenizer import build_tokenizer, vocabulary_sentences

SMALL = TinyArchitecture(
    vision_width=32, vision_depth=2, vision_heads=2, vision_mlp=48, vision_deepstack=0, vision_positions=16,
    text_width=32, text_depth=3, text_heads=2, text_kv_heads=1, text_head_dim=16, text_mlp=48,
)  # fmt: skip
POINTING = GuideWeights(pointing_layer=1, pointing_heads=(0, 1))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(vocabulary_sentences(), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_tiny(SMALL, tokenizer, 3).eval()


@pytest.fixture(scope="module")
def fast_model(tokenizer):
    model = build_tiny(SMALL, tokenizer, 3).eval()
    use_fast_kernels(model)
    return model


def _noise(seed, high, wide):
    return np.random.default_rng(seed).integers(0, 256, size=(high * 32, wide * 32, 3), dtype=np.uint8)


def test_patches_equal_the_stock_processor():
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    picture = _noise(1, 3, 5)
    size = {"shortest_edge": 1024, "longest_edge": 1024 * 1024}
    stock = processor(images=[Image.fromarray(picture)], size=size, return_tensors="np")
    assert stock["image_grid_thw"].tolist() == [[1, 6, 10]]
    frames = stock["pixel_values"].reshape(-1, 3, 2, 256)
    assert np.allclose(frames[:, :, 0], frames[:, :, 1])
    assert np.allclose(frames[:, :, 0].reshape(-1, 768), patchify(picture), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "budget"), [((620, 1500), 144), ((620, 1500), 288), ((2000, 300), 64), ((32, 5000), 64)]
)
def test_fit_keeps_the_budget(size, budget):
    w, h = fit_to_tokens(*size, budget)
    assert w >= 1
    assert h >= 1
    assert w * h <= budget


def test_crops_enlarged_and_sequences_of_the_template(tokenizer):
    w, h = fit_to_tokens(60, 30, 144, 64)
    assert 64 <= w * h <= 144
    assert w > h
    example = Example("t", (_noise(1, 1, 2),), (None,), (Query("What is it?", "A1"),))
    text = tokenizer.decode(collate([example], tokenizer).input_ids[0]).replace("<|endoftext|>", "")
    picture = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>user\n{picture}What is it?<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>"


def test_positions_equal_the_stock_model(tokenizer, model):
    example = Example("t", (_noise(1, 2, 3), _noise(2, 1, 4)), (None, None), (Query("What is it?", "A1"),))
    batch = collate([example], tokenizer)
    stock, _ = model.model.get_rope_index(
        batch.input_ids,
        mm_token_type_ids=(batch.input_ids == model.config.image_token_id).int(),
        image_grid_thw=batch.grid_thw,
    )
    real = int((batch.input_ids[0] != tokenizer.pad_token_id).sum())
    assert torch.equal(stock[..., :real], batch.position_ids[..., :real])


def test_each_question_is_answered_as_if_alone(tokenizer, fast_model):
    queries = (Query("What is the date?", "1/2"), Query("Is there a stamp?", "yes"))
    views = (_noise(5, 2, 2),)
    together = collate([Example("t", views, (None,), queries)], tokenizer)
    alone = collate([Example("t", views, (None,), queries[1:])], tokenizer)
    guided = GuidedModel(fast_model, POINTING)
    core = guided.model.model

    def logits(batch):
        with torch.no_grad():
            vision = core.get_image_features(batch.pixels, batch.grid_thw, return_dict=True)
            hidden = core(
                input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids,
                mm_encoder_outputs={"image": vision}, use_cache=False,
            ).last_hidden_state  # fmt: skip
        return guided.model.lm_head(hidden)

    second = (together.branch == 1) & (together.labels != IGNORE)
    assert torch.allclose(logits(together)[second], logits(alone)[alone.labels != IGNORE], atol=1e-5)


def test_fast_kernels_change_no_number_and_no_gradient(tokenizer, model, fast_model):
    examples = [
        Example("t", (_noise(6, 2, 2), _noise(7, 1, 3)), (None, None), (Query("Is there a stamp?", "no"),)),
        Example("t", (_noise(8, 2, 2),), (None,), (Query("What?", "7.50"),)),
    ]
    batch = collate(examples, tokenizer)
    doubled = batch.pixels.view(-1, 3, 1, 256).expand(-1, 3, 2, 256).reshape(-1, 1536)
    torch.manual_seed(0)
    stock = GuidedModel(model, POINTING)
    torch.manual_seed(0)
    fast = GuidedModel(fast_model, POINTING)
    first = stock(dataclasses.replace(batch, pixels=doubled))
    second = fast(batch)
    assert first.parts["answer"] == pytest.approx(second.parts["answer"], abs=1e-5)
    first.loss.backward()
    second.loss.backward()
    for (name, one), (_, two) in zip(model.named_parameters(), fast_model.named_parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            assert torch.allclose(one.grad, two.grad, atol=1e-5), name
    model.zero_grad()
    fast_model.zero_grad()


def test_glyph_slots_know_where_characters_are(tokenizer):
    glyphs = Glyphs(
        np.array([[4.0, 8.0], [36.0, 24.0], [60.0, 8.0]]), np.array([12.0, 12.0, 3.0]), glyph_classes("A7x")
    )
    example = Example("t", (_noise(9, 1, 2),), (glyphs,), (Query("?", "A"),))
    slots = collate([example], tokenizer).glyph_target
    assert slots.shape == (2, SLOTS)
    assert slots[0].tolist() == [IGNORE, ord("A") - 32, IGNORE, *[0] * 13]
    # The 7 is in the lower row; text 3 px high is unknown, and so are its neighbours.
    assert slots[1].tolist() == [*[0] * 6, IGNORE, IGNORE, IGNORE, ord("7") - 32, IGNORE, *[0] * 5]


def _spelled(text, shape, frames):
    """Slot logits, all but certain, that spell a text along the given columns of the upper row of slots."""
    slots = torch.full((shape[0] * shape[1] // 1024 * SLOTS, len(GLYPHS) + 1), -10.0)
    slots[:, 0] = 0.0
    for column, char in zip(frames, text, strict=True):
        slots[column // 8 * SLOTS + column % 8, glyph_classes(char)[0]] = 10.0
    return slots


@pytest.mark.parametrize(("capitals", "exact"), [(True, True), (False, False)])
def test_the_line_guide_reads_along_the_line(tokenizer, capitals, exact):
    line = ReadLine((4.0, 8.0), (60.0, 8.0), "ABB7", capitals)
    batch = collate([Example("t", (_noise(1, 1, 2),), (None,), (), read_lines=((line,),))], tokenizer)
    assert batch.line_frames.shape == (1, 16)
    assert count_targets(batch).characters == 4
    loss, right = line_loss(_spelled("aBB7", (32, 64), (2, 5, 8, 12)), batch)
    assert right.tolist() == [exact]
    assert (float(loss) < 1.0) == exact


def test_a_line_with_more_characters_than_slots_is_left_out(tokenizer):
    line = ReadLine((4.0, 8.0), (12.0, 8.0), "TOO LONG", True)
    batch = collate([Example("t", (_noise(1, 1, 2),), (None,), (), read_lines=((line,),))], tokenizer)
    assert len(batch.line_frames) == 0
    loss, right = line_loss(torch.zeros(2 * SLOTS, len(GLYPHS) + 1), batch)
    assert float(loss) == 0.0
    assert len(right) == 0


def test_a_pool_is_cut_into_batches_of_one_kind(tokenizer):
    asked = [Example("a", (_noise(n, 1, n + 1),), (None,), (Query("What?", "1"),)) for n in range(9)]
    silent = [Example("s", (_noise(n, 2, 2),), (None,), ()) for n in range(5)]
    groups = split_pool([*asked, *silent], tokenizer, 100)
    assert sum(len(group) for group in groups) == 14
    assert all(len({bool(example.queries) for example in group}) == 1 for group in groups)
    assert len(groups) > 2


def test_pointing_targets_are_the_visual_tokens_of_the_characters(tokenizer):
    points = np.array([[[10.0, 10.0], [70.0, 40.0]], [[40.0, 10.0], [np.nan, np.nan]]], dtype=np.float32)
    example = Example("t", (_noise(1, 1, 2), _noise(2, 2, 3)), (None, None), (Query("?", "A1", points),))
    batch = collate([example], tokenizer)
    pads = (batch.input_ids[0] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero().flatten().tolist()
    asked = (batch.labels[0] != IGNORE).nonzero().flatten().tolist()
    assert batch.locate_target[0, asked].tolist() == [pads[0], pads[1], IGNORE]
    assert batch.read_target[0, asked].tolist() == [pads[2 + 5], pads[1], IGNORE]


def test_matching_targets_are_the_visual_tokens_of_the_questions_words(tokenizer, fast_model):
    asked_points = np.full((4, 2, 2), np.nan, dtype=np.float32)
    asked_points[0] = [[10.0, 10.0], [70.0, 40.0]]
    asked_points[2, 0] = [40.0, 10.0]
    query = Query("A B?", "1", None, asked_points)
    batch = collate([Example("t", (_noise(1, 1, 2), _noise(2, 2, 3)), (None, None), (query,))], tokenizer)
    ids = batch.input_ids[0].tolist()
    pads = [place for place, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<|image_pad|>")]
    question, offsets = (tokenizer("A B?", return_offsets_mapping=True)[key] for key in ("input_ids", "offset_mapping"))
    first = next(n for n in range(len(ids)) if ids[n : n + len(question)] == question)
    wanted = {0: pads[2 + 5], 2: pads[1]}
    assert batch.match_target[0, first : first + len(question)].tolist() == [wanted.get(b, IGNORE) for b, _ in offsets]
    assert int((batch.match_target != IGNORE).sum()) == len([b for b, _ in offsets if b in wanted]) >= 1
    assert count_targets(batch).matches == 2 * int((batch.match_target != IGNORE).sum())
    weights = GuideWeights(
        pointing_layer=1, pointing_heads=(0, 1), matching=0.5, matching_layer=0, matching_heads=(0, 1)
    )
    part = GuidedModel(fast_model, weights)(batch).parts["matching"]
    assert 0.5 < part < 5
    assert "matching" not in GuidedModel(fast_model, POINTING)(batch).parts


def test_exact_match_is_what_greedy_decoding_writes(tokenizer, model, fast_model):
    picture = _noise(11, 2, 2)
    batch = collate([Example("t", (picture,), (None,), (Query("Read the text.", "AB"),))], tokenizer)
    prompt = batch.input_ids[:, : int((batch.labels[0] != IGNORE).nonzero()[0]) + 1]
    with torch.no_grad():
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt),
            mm_token_type_ids=(prompt == model.config.image_token_id).int(),
            pixel_values=batch.pixels.view(-1, 3, 1, 256).expand(-1, 3, 2, 256).reshape(-1, 1536),
            image_grid_thw=batch.grid_thw, max_new_tokens=3, do_sample=False,
        )[0, prompt.shape[1] :]  # fmt: skip
    text = tokenizer.decode(written[:1])
    again = collate([Example("t", (picture,), (None,), (Query("Read the text.", text),))], tokenizer)
    with torch.no_grad():
        result = GuidedModel(fast_model, POINTING)(again)
    assert int(result.exact[0, 0]) == int(len(written) > 1 and written[1] == tokenizer.eos_token_id)


def test_rows_that_share_their_slots_teach_nothing(tokenizer):
    lines = tuple(ReadLine((4.0, y), (60.0, y), "ABC", True) for y in (6.0, 14.0, 24.0))
    batch = collate([Example("t", (_noise(1, 1, 2),), (None,), (), read_lines=(lines,))], tokenizer)
    assert len(batch.line_frames) == 1
