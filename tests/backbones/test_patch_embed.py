import copy

import pytest
import torch
from torch import nn

from qzoom.backbones.qwen_vl import use_linear_patches
from tests import tiny_models


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "glm4v", "qwen3_5"])
def test_the_patch_embedding_is_the_convolution(family):
    backbone = tiny_models.build_tiny_backbone(family)
    own = backbone.vision_tower.patch_embed.proj
    assert isinstance(own, nn.Conv3d)
    assert "forward" in vars(own)
    patches = torch.randn(5, own.in_channels, *own.kernel_size, generator=torch.Generator().manual_seed(0))
    wanted = nn.Conv3d.forward(own, patches)
    found = own(patches)
    assert found.shape == wanted.shape == (5, own.out_channels, 1, 1, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(own)
    with torch.no_grad():
        twin.weight.zero_()
        if twin.bias is not None:
            twin.bias.zero_()
    assert not twin(patches).any(), "a copy computes with its own weights"
    assert torch.equal(own(patches), found)


def test_overlapping_or_dilated_patches_stay_a_convolution():
    tower = nn.Module()
    tower.patch_embed = nn.Module()
    tower.patch_embed.proj = nn.Conv3d(3, 4, (2, 8, 8), (2, 4, 4))
    use_linear_patches(tower)
    assert "forward" not in vars(tower.patch_embed.proj)
    use_linear_patches(nn.Module())
    tower.patch_embed.proj = nn.Conv3d(3, 4, (2, 8, 8), (2, 8, 8), dilation=(1, 2, 2))
    use_linear_patches(tower)
    assert "forward" not in vars(tower.patch_embed.proj)
