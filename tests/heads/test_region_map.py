import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qzoom.config import ZoomConfig
from qzoom.heads.region_map import blur, corner_keep, mean_head_logits, peak_score, region_map

GRIDS = [(1, 1), (1, 7), (9, 1), (2, 2), (5, 8), (20, 20), (3, 100)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 3)])
def test_mean_over_heads_is_the_direct_sum(heads, kv_heads):
    torch.manual_seed(0)
    query, keys = torch.randn(heads, 8), torch.randn(kv_heads, 5, 8)
    used = max(heads, kv_heads)
    expected = [
        sum(
            float(query[h if heads > 1 else 0].double() @ keys[h * kv_heads // used, n].double()) / math.sqrt(8)
            for h in range(used)
        )
        / used
        for n in range(5)
    ]
    found = mean_head_logits(query, keys)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert mean_head_logits(query.bfloat16(), keys.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("grid", GRIDS)
def test_blur_is_a_weighted_mean_of_the_neighbours(grid):
    torch.manual_seed(1)
    prob = torch.rand(grid)
    side = math.exp(-0.5)
    weights = {-1: side / (1 + 2 * side), 0: 1 / (1 + 2 * side), 1: side / (1 + 2 * side)}

    def reflect(i: int, n: int) -> int:
        return 0 if n == 1 else -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = sum(
                weights[i] * weights[j] * float(prob[reflect(row + i, grid[0]), reflect(column + j, grid[1])])
                for i in weights
                for j in weights
            )
            assert float(blur(prob)[row, column]) == pytest.approx(expected, abs=1e-6)
        if grid[0] * grid[1] > 100 and row > 2:
            break


@pytest.mark.parametrize("grid", GRIDS)
def test_blur_keeps_a_constant_map(grid):
    torch.testing.assert_close(blur(torch.full(grid, 0.3)), torch.full(grid, 0.3), atol=1e-6, rtol=0)


class Convolutions(TorchDispatchMode):
    """Counts operations that a device may run in reduced precision."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(func) for word in ("conv", "mm", "matmul"))
        return func(*args, **(kwargs or {}))


def test_blur_uses_nothing_that_devices_round_to_tf32():
    with Convolutions() as seen:
        blur(torch.rand(9, 7))
    assert seen.count == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blur_on_cuda_is_that_of_the_cpu():
    prob = torch.rand(40, 60)
    torch.testing.assert_close(blur(prob.cuda()).cpu(), blur(prob), atol=1e-6, rtol=0)


def test_corner_and_no_rule():
    assert bool((corner_keep((16, 16)) == 1).all())  # 256 cells are not more than 256
    keep = corner_keep((20, 40))
    dropped = {(int(r), int(c)) for r, c in (keep == 0).nonzero()}
    assert dropped == {(r, 0) for r in range(5)} | {(0, c) for c in range(10)}
    assert corner_keep((1, 300))[0, :75].sum() == 0
    assert corner_keep((1, 300))[0, 75:].sum() == 225
    assert corner_keep((2, 200))[1].sum() == 200
    logits = torch.randn(300)
    made = region_map(logits, torch.full((300,), 9.0), (15, 20), ZoomConfig(sink="none"))
    assert made.sink_prob is None
    assert torch.equal(made.masked, logits.view(15, 20).sigmoid())
    corner = region_map(logits, None, (15, 20), ZoomConfig(sink="corner"))
    assert torch.equal(corner.masked, logits.view(15, 20).sigmoid() * corner_keep((15, 20)))
    assert corner.masked[0, 0] == 0


def test_first_token_rule_drops_what_reaches_the_threshold():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    sinks = torch.tensor([-5.0, math.log(3.0) - 1e-3, math.log(3.0) + 1e-3, 5.0])  # sigmoid(ln 3) is 0.75
    made = region_map(logits, sinks, (2, 2), ZoomConfig(sink="first_token"))
    assert made.keep.flatten().tolist() == [1, 1, 0, 0]
    assert made.masked.flatten().tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0, 0])
    assert torch.equal(made.blurred, blur(made.masked))
    assert made.sink_prob is not None
    assert made.sink_prob.flatten().tolist() == pytest.approx(sinks.sigmoid().tolist())
    looser = region_map(logits, sinks, (2, 2), ZoomConfig(sink="first_token", sink_threshold=0.9))
    assert looser.keep.flatten().tolist() == [1, 1, 1, 0]


def test_how_far_a_peak_stands_out():
    one = torch.tensor([[0.6, 0.1], [0.1, 0.0]])
    assert peak_score([one]) == pytest.approx(1 - 0.2 / 0.6)  # three times the mean
    assert peak_score([one, torch.zeros(1, 4)]) == pytest.approx(1 - 0.1 / 0.6)  # the mean is that of all pictures
    assert peak_score([torch.full((3, 5), 0.4)]) == pytest.approx(0, abs=1e-6)
    assert peak_score([torch.zeros(2, 2)]) == 0
