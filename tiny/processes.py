"""Several processes that train one model: every one computes a share of each step, and all end with the same weights.

`python -m torch.distributed.run --standalone --nproc-per-node 2 tiny/train.py train ...` starts two. Gradients are
summed over gloo, so the result is that of one process, rounding aside. A single process pays nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Processes:
    """This process among those that torchrun started."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, parts: Sequence[T], costs: Iterable[float]) -> list[T]:
        """The parts that are this process's, about as much work as every other one's."""
        return split_evenly(parts, costs, self.count)[self.rank]

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes; a weight that none of them used stays without."""
        if self.count == 1:
            return
        weights = list(weights)
        used = torch.tensor([float(weight.grad is not None) for weight in weights])
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten().cpu() for w in weights])
        dist.all_reduce(used)
        dist.all_reduce(flat)
        pieces = flat.split([weight.numel() for weight in weights])
        for weight, count, piece in zip(weights, used.tolist(), pieces, strict=True):
            weight.grad = piece.view_as(weight).to(weight.device) if count else None

    def total(self, *values: float) -> list[float]:
        """The sums of numbers over all processes."""
        if self.count == 1:
            return list(values)
        sums: Tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()


def split_evenly(parts: Sequence[T], costs: Iterable[float], count: int) -> list[list[T]]:
    """The parts in `count` lists of about the same cost: the dearest first, each to the list that costs least yet."""
    loads: list[float] = [0.0] * count
    lists: list[list[T]] = [[] for _ in range(count)]
    for cost, part in sorted(zip(costs, parts, strict=True), key=lambda pair: -pair[0]):
        least = loads.index(min(loads))
        loads[least] += cost
        lists[least].append(part)
    return lists
