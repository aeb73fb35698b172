import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qzoom.config import TokenBudget
from qzoom.evaluation.flops import ModelShape, answer_flops, decoder_flops, shape_of, vision_flops
from qzoom.evaluation.report_figures import rounds
from qzoom.types import Usage
from tests.evaluation.samples import model, row
from tests.tiny_models import FAMILIES, engine, picture

SMALL = ModelShape(
    layers=4, hidden=2, query=4, key=1, feed=3, vocabulary=5, shared_layers=1, branch_layers=2, vision_layers=2,
    vision_hidden=2, vision_feed=3, vision_gated=False, vision_full_layers=2, window_patches=0, patch_values=6,
    merge=2, mergers=1,
)  # fmt: skip


def test_decoder_and_vision_by_hand():
    # a token: q 2x4, k and v 2x1 each, o 4x2, three of 2x3 -> 38 products; attention: 4 * query for each visible key
    assert decoder_flops(SMALL, 1, 1) == 2 * 38 + 4 * 4 * 1
    assert decoder_flops(SMALL, 1, 3) == 3 * 76 + 16 * (1 + 2 + 3)
    assert decoder_flops(SMALL, 2, 2, past=5) == 2 * (2 * 76 + 16 * (6 + 7))
    assert decoder_flops(SMALL, 4, 5) == decoder_flops(SMALL, 4, 3) + decoder_flops(SMALL, 4, 2, past=3)
    # one token = 4 patches: entry 6x2, layer 4 of 2x2 and two of 2x3, attention 4*4 pairs, merger 8x8 and 8x2
    entry, layer, attention, merger = 4 * 2 * 12, 4 * 2 * (16 + 12), 4 * 4 * 4 * 2, 2 * (64 + 16)
    assert vision_flops(SMALL, 1) == entry + 2 * (layer + attention) + merger
    shape = shape_of(model().engine)
    assert ModelShape(**shape.to_dict()) == shape
    assert (shape.layers, shape.shared_layers, shape.branch_layers, shape.merge) == (7, 3, 3, 2)


def test_an_answer_is_the_sum_of_its_steps():
    given = {"completion_tokens": 1, "gate": False, "region_branch": False}
    logits = 2 * 2 * 5
    plain = answer_flops(SMALL, coarse_tokens=3, region_tokens=0, prompt_tokens=5, **given)
    assert plain == vision_flops(SMALL, 3) + decoder_flops(SMALL, 4, 5) + logits
    more = answer_flops(SMALL, coarse_tokens=3, region_tokens=0, prompt_tokens=5, **given | {"completion_tokens": 3})
    assert more == plain + 2 * logits + decoder_flops(SMALL, 4, 2, past=5)
    zoomed = answer_flops(
        SMALL, coarse_tokens=3, region_tokens=2, prompt_tokens=7, completion_tokens=1, gate=True, region_branch=True
    )
    branches = decoder_flops(SMALL, 2, 5) + 2 * 2 + decoder_flops(SMALL, 1, 5) + 2 * 2 * (3 * 1 + 4) + 2 * 4 * 3
    again = vision_flops(SMALL, 2) + decoder_flops(SMALL, 1, 4, past=3)
    first = vision_flops(SMALL, 3) + decoder_flops(SMALL, 1, 5)
    assert zoomed == first + branches + again + decoder_flops(SMALL, 3, 7) + logits
    some = {"coarse_tokens": 3, "region_tokens": 2, "prompt_tokens": 7, "completion_tokens": 1}
    sparse = answer_flops(SMALL, **some, gate=True, region_branch=True, encoded_tokens=6)
    assert sparse == zoomed - vision_flops(SMALL, 2) + vision_flops(SMALL, 6)
    looked = answer_flops(SMALL, **some, gate=True, region_branch=True, looked_tokens=2)
    twice = decoder_flops(SMALL, 3, 2, past=3) + 2 * logits + decoder_flops(SMALL, 4, 1, past=5)
    assert looked == zoomed + twice
    both = {"coarse_tokens": 3, "region_tokens": 6, "prompt_tokens": 11, "completion_tokens": 2}
    reread = answer_flops(SMALL, **both, gate=True, region_branch=True, reread_tokens=4)
    one = answer_flops(SMALL, **some | {"completion_tokens": 2}, gate=True, region_branch=True)
    new = vision_flops(SMALL, 4) + decoder_flops(SMALL, 4, 6, past=3)
    assert reread == one + new + 2 * logits + decoder_flops(SMALL, 4, 1, past=9)
    unzoomed = {"coarse_tokens": 3, "region_tokens": 0, "prompt_tokens": 5}
    doubted = answer_flops(SMALL, **some, gate=False, region_branch=True, upper_tokens=5)
    sure = answer_flops(SMALL, **some, gate=False, region_branch=True)
    assert doubted == sure + decoder_flops(SMALL, 3, 5) + logits
    rounds = answer_flops(
        SMALL, **unzoomed, **given, other_tokens=6, other_text_tokens=2, other_completion_tokens=2,
    )  # fmt: skip
    asked = decoder_flops(SMALL, 1, 2, past=4) + decoder_flops(SMALL, 3, 6)
    assert rounds == plain + asked + 2 * logits + decoder_flops(SMALL, 4, 1, past=6)


@pytest.mark.parametrize(
    ("method", "stored", "paid"),
    [
        ("margin", {"prompt_tokens": 155}, {"upper_tokens": 155}),
        ("entropy", {"prompt_tokens": 155}, {"upper_tokens": 155}),
        (
            "attention", {"prompt_tokens": 318},
            {"upper_tokens": 154, "other_tokens": 164, "other_text_tokens": 27},
        ),
        (
            "agentic", {"prompt_tokens": 250, "completion_tokens": 5, "failures": 1},
            {"upper_tokens": 0, "other_tokens": 250, "other_text_tokens": 113, "completion_tokens": 5, "failures": 1},
        ),
        ("attention", {"upper_tokens": 9, "failures": 1}, {"upper_tokens": 9, "failures": 1}), ("plain", {}, {}),
    ],
)  # fmt: skip
def test_rows_of_earlier_versions_are_read_as_what_was_done(method, stored, paid):
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>"
    usage = Usage(130, 70, 226, 7, 137)
    assert rounds(method, row(zoom=[(0, 0, 9, 9)], prompt=prompt)) == {}
    old = dataclasses.replace(row(zoom=[(0, 0, 9, 9)], prompt=prompt), usage=usage, extra=stored)
    assert rounds(method, old) == paid


@pytest.mark.parametrize("family", [*FAMILIES, "llava"])
def test_close_to_what_torch_counts(family):
    """Torch counts whole attention matrices and a little padding; projections dominate, so both agree within 15 %."""
    made = engine(family, attn="eager")
    shape = shape_of(made)
    backbone = made.backbone
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        features = backbone.encode([picture(1, 300, 300)], [TokenBudget(20, 40)])[0]
    tokens = features.tokens.shape[0]
    assert vision_flops(shape, tokens) == pytest.approx(counter.get_total_flops(), rel=0.15)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        hidden = torch.randn(1, 50, backbone.hidden_size)
        rotary = backbone.rotary(hidden, torch.arange(50).expand(backbone.position_axes, 1, 50))
        for layer in backbone.layers:
            hidden = backbone.run_layer(layer, hidden, rotary, None, None)
    assert decoder_flops(shape, backbone.num_layers, 50) == pytest.approx(counter.get_total_flops(), rel=0.15)
