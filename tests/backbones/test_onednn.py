"""Linear maps by oneDNN: the same values, and only where they are meant to be."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qzoom.backbones import onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def used(call):
    """What a call gives within the mode, and whether oneDNN computed it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen, onednn.OneDnnLinear():
        out = call()
    return out, any("_linear_pointwise" in event.key for event in seen.key_averages())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_large_maps_have_the_same_values(tokens, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 1024, bias=bias)
    hidden = torch.randn(2, 2 * tokens, 512)[:, ::2]
    with torch.inference_mode():
        out, fast = used(lambda: layer(hidden))
        assert fast
        torch.testing.assert_close(out, layer(hidden), atol=1e-5, rtol=1e-5)


def test_other_maps_are_left_alone():
    small, large = torch.nn.Linear(64, 64), torch.nn.Linear(512, 1024)
    hidden = torch.randn(3, 512)
    out, fast = used(lambda: large(hidden))  # with gradients
    assert not fast
    assert out.requires_grad
    with torch.inference_mode():
        for call in (lambda: small(hidden[:, :64]), lambda: large.bfloat16()(hidden.bfloat16())):
            out, fast = used(call)
            assert not fast
            assert out.shape[0] == 3
