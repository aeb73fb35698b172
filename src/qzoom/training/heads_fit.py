"""Fit the region branch and the gate on kept hidden states; the base is never touched (method.md 5.4-5.5 and 8)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qzoom.engine.perceive import region_logits
from qzoom.engine.state import Engine, advance_gate, advance_region
from qzoom.training.heads_store import BranchExample
from qzoom.training.losses import gate_loss, region_loss

__all__ = ["FitReport", "fit_gate", "fit_region"]


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a fit ended with.

    Args:
        steps: optimiser steps.
        losses: mean loss of each tenth of the run.
    """

    steps: int
    losses: tuple[float, ...]


def fit_region(
    engine: Engine,
    examples: Sequence[BranchExample],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> FitReport:
    """Train the region branch: binary cross entropy over the labelled cells of each batch together.

    Args:
        engine: its region branch is trained in place.
        examples: kept states and label maps.
        steps: optimiser steps.
        batch: examples per step.
        learning_rate: peak; linear warm-up, then cosine to zero.
        seed: of the order.
        on_step: called with the step and its loss.
    """
    assert engine.region is not None

    def loss_of(chosen: Sequence[int]) -> Tensor:
        states = advance_region(engine, [examples[i].state() for i in chosen])
        logits = [region_logits(engine, state)[0] for state in states]
        return region_loss(logits, [examples[i].labels for i in chosen])

    return _fit(engine.region, loss_of, len(examples), steps, batch, learning_rate, seed, on_step)


def fit_gate(
    engine: Engine,
    examples: Sequence[BranchExample],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> FitReport:
    """Train the gate: target 1 means the coarse look is not enough. Arguments as in `fit_region`."""
    gate = engine.gate
    assert gate is not None

    def loss_of(chosen: Sequence[int]) -> Tensor:
        _, hidden = advance_gate(engine, [examples[i].state() for i in chosen])
        targets = torch.stack([examples[i].labels for i in chosen])
        return gate_loss(gate.logit(torch.stack(hidden)), targets)

    return _fit(gate, loss_of, len(examples), steps, batch, learning_rate, seed, on_step)


def _fit(
    module: nn.Module,
    loss_of: Callable[[Sequence[int]], Tensor],
    count: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] | None,
) -> FitReport:
    """AdamW without weight decay, betas (0.9, 0.98), gradient norm 1, 3 % warm-up and cosine."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, int(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))),
    )
    rng = random.Random(seed)
    order: list[int] = []
    losses = []
    for step in range(steps):
        while len(order) < batch:
            order += rng.sample(range(count), count)
        chosen, order = order[:batch], order[batch:]
        loss = loss_of(chosen)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step + 1, losses[-1])
    for parameter in parameters:
        parameter.requires_grad_(False)
    tenth = max(1, steps // 10)
    means = tuple(sum(losses[i : i + tenth]) / len(losses[i : i + tenth]) for i in range(0, steps, tenth))
    return FitReport(steps, means)
