import dataclasses

import pytest
import torch

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.prompt import Prompt, build_prompt, prefix_length
from qzoom.engine.zoom import RegionBlock, insert_regions, read_tokens
from qzoom.heads.boxes import MapBox
from tests import tiny_models


def features(rows: int, columns: int) -> VisualFeatures:
    return VisualFeatures(torch.zeros(rows * columns, tiny_models.HIDDEN), (), (rows, columns), (1, 1))


def two_pictures() -> Prompt:
    """5 7 <start> 4x6 <end> 9 <start> 3x2 <end> 11 12."""
    backbone = tiny_models.engine("qwen3_vl").backbone
    (opening,), (closing,) = backbone.image_delimiters
    pad = backbone.image_token_id
    ids = [5, 7, opening, pad, closing, 9, opening, pad, closing, 11, 12]
    return build_prompt(backbone, ids, [features(4, 6), features(3, 2)])


BLOCKS = [
    RegionBlock(1, (0, 1, 2, 3), features(2, 3)),
    RegionBlock(0, (1, 0, 4, 2), features(5, 2)),
    RegionBlock(0, (5, 3, 6, 4), features(1, 1)),
]


def test_a_prompt_knows_its_spans_and_its_prefix():
    backbone = tiny_models.engine("qwen3_vl").backbone
    prompt = two_pictures()
    assert [(s.start, s.stop, s.picture, s.role) for s in prompt.spans] == [(3, 27, 0, "coarse"), (30, 36, 1, "coarse")]
    assert len(prompt) == 39
    assert prefix_length(backbone, prompt) == 37
    assert prompt.next_position == float(prompt.positions[:, -1].max()) + 1


@pytest.mark.parametrize("scheme", ["second_image", "aligned"])
def test_regions_follow_their_picture_in_the_given_order(scheme):
    engine = tiny_models.engine("qwen3_vl")
    backbone, before = engine.backbone, two_pictures()
    after, reused = insert_regions(backbone, before, BLOCKS, engine.config.replace(positions=scheme))
    (opening,), (closing,) = backbone.image_delimiters
    pad = backbone.image_token_id
    expected = [5, 7, opening, *([pad] * 24), closing]
    expected += [opening, *([pad] * 10), closing, opening, pad, closing]
    expected += [9, opening, *([pad] * 6), closing]
    expected += [opening, *([pad] * 6), closing]
    assert after.ids.tolist() == [*expected, 11, 12]
    assert [(s.role, s.picture, s.features.grid) for s in after.spans] == [
        ("coarse", 0, (4, 6)), ("region", 0, (5, 2)), ("region", 0, (1, 1)), ("coarse", 1, (3, 2)),
        ("region", 1, (2, 3)),
    ]  # fmt: skip
    assert all((after.ids[s.start : s.stop] == pad).all() for s in after.spans)
    assert reused == 28
    assert torch.equal(after.positions[:, :28], before.positions[:, :28].to(after.positions.dtype))
    assert after.positions.shape == (3, len(after))


def test_stock_positions_are_those_of_further_pictures():
    engine = tiny_models.engine("qwen3_vl")
    after, _ = insert_regions(engine.backbone, two_pictures(), BLOCKS, engine.config)
    expected = engine.backbone.positions(after.ids, [(4, 6), (5, 2), (1, 1), (3, 2), (2, 3)])
    assert torch.equal(after.positions, expected)


@pytest.mark.parametrize(("shift", "delays"), [("max", (8, 5)), ("min", (4, 2))])
def test_aligned_positions_by_hand(shift, delays):
    engine = tiny_models.engine("qwen3_vl")
    before = two_pictures()
    config = engine.config.replace(positions="aligned", temporal_shift=shift)
    after, _ = insert_regions(engine.backbone, before, BLOCKS, config)
    regions = [s for s in after.spans if s.role == "region"]
    own = [after.positions[:, s.start : s.stop].view(3, *s.features.grid) for s in regions]
    # the first picture's cells start at position 3 on every axis; its blocks push the rest by 5 + 2 and 1 + 2
    assert own[0][0].unique().tolist() == [3 + delays[0]]
    assert own[0][1][:, 0].tolist() == [3, 3.25, 3.5, 3.75, 4]
    assert own[0][2][0].tolist() == [4, 6]
    assert own[1].flatten().tolist() == [3 + delays[0], 3 + 3, 3 + 5]
    second = int(before.positions[0, 30]) + 7 + 3
    assert torch.equal(after.positions[:, 43 + 2 : 43 + 2 + 6], before.positions[:, 30:36].float() + 10)
    assert own[2][0].unique().tolist() == [second + delays[1]]
    assert own[2][1][:, 0].tolist() == [second + 1, second + 2]
    assert own[2][2][0].tolist() == [second, second + 0.5, second + 1]
    # the question moves by all three blocks: 7 + 3 + (3 + 2)
    assert torch.equal(after.positions[:, -2:], before.positions[:, -2:].float() + 15)


@pytest.mark.parametrize(
    ("cells", "rows_at"),
    [((3.0, 4.0), [6.0] * 5), ((3.5, 4.0), [6.25] * 5), ((3.0, 4.5), [6.0, 6.125, 6.25, 6.375, 6.5])],
)
def test_a_region_lower_than_a_cell_lies_in_its_middle(cells, rows_at):
    engine = tiny_models.engine("qwen3_vl")
    config = engine.config.replace(positions="aligned")
    block = next(block for block in BLOCKS if block.features.grid == (5, 2))
    block = dataclasses.replace(block, cells=(1.0, cells[0], 5.0, cells[1]))
    after, _ = insert_regions(engine.backbone, two_pictures(), [block], config)
    span = next(s for s in after.spans if s.role == "region")
    own = after.positions[:, span.start : span.stop].view(3, *span.features.grid)
    assert own[1][:, 0].tolist() == rows_at
    assert own[2][0].tolist() == [4, 7]


@pytest.mark.parametrize(
    ("cells", "grid"),
    [((0, 0, 4, 4), (4, 4)), ((0, 0, 12, 4), (4, 12)), ((0, 0, 2, 1), (3, 6)), ((0, 0, 4, 1), (3, 12))],
)
def test_tokens_per_cell_enlarge_neither_side(cells, grid):
    config = tiny_models.engine("qwen3_vl").config.replace(tokens_per_cell=3.0)
    features = VisualFeatures(torch.randn(48, 8), (), (4, 12), (384, 128))
    read = read_tokens(features, MapBox(0, cells, (0, 0, 384, 128), 0.5), config)
    assert read.grid == grid
    assert read.tokens.shape == (grid[0] * grid[1], 8)
