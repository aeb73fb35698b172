import copy
import io

import pytest
import torch
from torch import nn

from qzoom.errors import ConfigError
from qzoom.training import optim
from qzoom.training.optim import MuonWithAdamW
from qzoom.training.student.recipe import SftSettings
from qzoom.training.student.trainers import make_optimizer


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)

    def forward(self, ids):
        return self.norm(self.frozen(self.inner(self.embed(ids)))).square().mean() + self.inner(self.embed(ids)).sum()


PART = SftSettings(optimizer="muon", learning_rate=1e-2, betas=(0.9, 0.98), weight_decay=0.1)


def step(model, *optimizers):
    model(torch.tensor([0, 1, 3])).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_steps_are_those_of_muon_and_adamw_alone(monkeypatch):
    monkeypatch.setattr(optim, "bfloat16_is_slow", lambda: False)
    one, two = Small(), Small()
    together = make_optimizer(one, PART)
    muon = torch.optim.Muon([two.inner.weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [two.embed.weight, two.inner.bias, two.norm.weight, two.norm.bias]
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.98))
    for _ in range(4):
        step(one, together)
        step(two, muon, adamw)
    before, after = Small().state_dict(), one.state_dict()
    assert all(torch.equal(after[name], value) for name, value in two.state_dict().items())
    assert {name for name in before if torch.equal(before[name], after[name])} == {"frozen.weight", "frozen.bias"}


def test_where_bfloat16_is_slow_muon_computes_in_float32(monkeypatch):
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    updates = {}
    for slow in (False, True):
        monkeypatch.setattr(optim, "bfloat16_is_slow", lambda slow=slow: slow)
        weight = nn.Parameter(torch.zeros(6, 4))
        weight.grad = grad.clone()
        MuonWithAdamW([weight], [], lr=1.0, weight_decay=0.0, betas=(0.9, 0.9)).step()
        assert torch.equal(weight.grad, grad)
        updates[slow] = weight.detach()
    assert not torch.equal(updates[True], updates[False])
    torch.testing.assert_close(updates[True], updates[False], rtol=0, atol=0.01)


def test_one_schedule_moves_both_rates_and_adamw_is_left_to_the_trainer():
    model = Small()
    optimizer = make_optimizer(model, PART)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    assert schedule.get_last_lr() == [0.0, 0.0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert make_optimizer(Small(), SftSettings()) is None
    with pytest.raises(ConfigError, match="optimizer"):
        SftSettings(optimizer="lion")


def test_a_restored_state_goes_on_exactly():
    one, two = Small(), Small()
    first = make_optimizer(one, PART)
    step(one, first)
    step(one, first)
    kept = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, kept)
    kept.seek(0)
    read = torch.load(kept, weights_only=True)
    two.load_state_dict(read["model"])
    second = make_optimizer(two, PART)
    second.load_state_dict(read["optimizer"])
    assert len(second.state) == 5
    for _ in range(2):
        step(one, first)
        step(two, second)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())


def test_matrices_alone_and_others_alone_work():
    model = Small()
    for matrices, others in (([model.inner.weight], []), ([], [model.norm.weight])):
        optimizer = MuonWithAdamW(matrices, others, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.9))
        before = [weight.detach().clone() for weight in matrices + others]
        step(model, optimizer)
        changed = zip(before, matrices + others, strict=True)
        assert not any(torch.equal(old, new) for old, new in changed)
