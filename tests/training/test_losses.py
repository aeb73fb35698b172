import math

import pytest
import torch

from qzoom.training.losses import answer_loss, gate_loss, region_loss


def test_region_loss_is_one_mean_over_all_valid_cells_of_resized_logits():
    first, second = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [-1.0]])
    loss = region_loss([first, second], [torch.tensor([[1, -100]]), torch.tensor([[0], [1]])])
    expected = (math.log(2) + math.log1p(math.e) + math.log1p(math.e)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    logits = torch.tensor([[0.0, 4.0]])
    loss = region_loss([logits], [torch.tensor([[1, 1, 1, 1]])])
    resized = [0.0, 1.0, 3.0, 4.0]  # corners not aligned
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in resized) / 4, rel=1e-6)
    with pytest.raises(ValueError, match="shorter"):
        region_loss([torch.zeros(1, 1), torch.zeros(1, 1)], [torch.zeros(1, 1)])
    with pytest.raises(ValueError, match="at least one"):
        region_loss([], [])


def test_gate_and_answer_losses_by_hand():
    loss = gate_loss(torch.tensor([0.0, 9.0, 3.0]), torch.tensor([[1], [-100], [0]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(3))) / 2, rel=1e-6)
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 3] = 2.0
    labels = torch.tensor([[-100, -100, 3, -100]])
    assert answer_loss(logits, labels).item() == pytest.approx(math.log(4 + math.exp(2)) - 2, rel=1e-6)
    logits = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert answer_loss(logits, torch.tensor([0, 1, 2])).item() == pytest.approx(math.log(5), rel=1e-6)


@pytest.mark.parametrize("extreme", [0.5, float("inf"), float("nan")])
def test_nothing_labelled_costs_zero_and_keeps_a_graph(extreme):
    map_logits = torch.full((2, 2), extreme, requires_grad=True)
    gate_logits = torch.full((2,), extreme, requires_grad=True)
    token_logits = torch.full((1, 3, 4), extreme, requires_grad=True)
    losses = [
        region_loss([map_logits], [torch.full((2, 2), -100)]),
        gate_loss(gate_logits, torch.tensor([-100, -100])),
        answer_loss(token_logits, torch.full((1, 3), -100)),
    ]
    assert [loss.item() for loss in losses] == [0.0, 0.0, 0.0]
    torch.stack(losses).sum().backward()
    for leaf in (map_logits, gate_logits, token_logits):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()
