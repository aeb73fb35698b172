from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qzoom.config import TokenBudget
from tests import tiny_models

BUDGET = TokenBudget(1, 30)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "glm4v", "qwen3_5"])
@pytest.mark.parametrize("size", [(300, 200), (64, 700), (32, 32)])
def test_looked_up_patches_are_the_processors(family, size):
    backbone: Any = tiny_models.engine(family).backbone
    picture = noise(*size)
    resized = backbone.resize(picture, BUDGET)
    wanted = backbone.image_processor(images=[resized], do_resize=False, return_tensors="pt")
    assert backbone._levels is not None
    pixels, grid = backbone.pixels(picture, BUDGET)
    assert torch.equal(pixels, wanted["pixel_values"])
    assert torch.equal(grid, wanted["image_grid_thw"])


def test_a_processor_that_does_more_is_asked():
    backbone: Any = tiny_models.build_tiny_backbone("qwen3_vl")
    own = backbone.image_processor

    class Neighbours:
        """Mixes each value with its neighbour's, which no table of values can tell."""

        patch_size, merge_size, temporal_patch_size, resample = 16, 2, 2, own.resample

        def __call__(self, images: list[Image.Image], **options: Any) -> Any:
            mixed = [np.asarray(one).astype(np.uint16) + np.roll(one, 1, axis=1) for one in images]
            return own(images=[Image.fromarray((one // 2).astype(np.uint8)) for one in mixed], **options)

    backbone.image_processor = Neighbours()
    assert backbone._levels is None
    picture = noise(100, 90)
    wanted = Neighbours()([backbone.resize(picture, BUDGET)], do_resize=False, return_tensors="pt")
    assert torch.equal(backbone.pixels(picture, BUDGET)[0], wanted["pixel_values"])
