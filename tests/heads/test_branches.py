import pytest
import torch

from qzoom.errors import ConfigError
from qzoom.heads.branches import new_gate, new_region
from tests import tiny_models


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_layers_are_copies_of_base_layers_k_to_k_plus_t(family):
    backbone = tiny_models.build_tiny_backbone(family)
    for branch in (new_gate(backbone, 3, 2), new_region(backbone, 3, 2)):
        assert len(branch.layers) == 2
        for i, layer in enumerate(branch.layers):
            base = dict(backbone.layers[3 + i].named_parameters())
            for name, weight in layer.named_parameters():
                assert torch.equal(weight, base[name])
                assert weight.data_ptr() != base[name].data_ptr()
        with torch.no_grad():
            branch.layers[0].mlp.down_proj.weight.zero_()
        assert bool(backbone.layers[3].mlp.down_proj.weight.any())


def test_the_gates_score_is_linear_and_dtype_follows_the_base():
    gate = new_gate(tiny_models.engine("qwen3_vl").backbone, 2, 1)
    hidden = torch.randn(5, tiny_models.HIDDEN)
    expected = hidden @ gate.head.weight[0] + gate.head.bias
    torch.testing.assert_close(gate.logit(hidden), expected)
    assert gate.logit(hidden[0]).shape == ()
    assert gate.head.bias.item() == 0
    backbone = tiny_models.engine("qwen2_5_vl", dtype=torch.bfloat16).backbone
    gate = new_gate(backbone, 1, 1)
    assert {w.dtype for w in gate.parameters()} == {torch.bfloat16}
    assert gate.logit(torch.randn(2, tiny_models.HIDDEN).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("make", [new_gate, new_region])
def test_more_layers_than_the_base_has_are_refused(make):
    with pytest.raises(ConfigError, match="K=5 shared and T=3 branch layers need 8 base layers, but the base has 7"):
        make(tiny_models.engine("qwen3_vl").backbone, 5, 3)
