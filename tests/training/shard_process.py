"""Two processes that share a small model by FSDP: gather it, restore it in another one, go on, and compare.

Prints the largest difference between the restored run and the one that was never stopped, and between the gathered
weights and those of a run in one process.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qzoom.training.sharded import gather, restore_optimiser


def make(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    module[0].bias.requires_grad_(False)
    if sharded:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module, torch.optim.AdamW([w for w in module.parameters() if w.requires_grad], lr=0.05)


def train(module: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    """The same batch on every process, so that one process alone gives the same gradients."""
    for step in steps:
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        module(inputs).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def farthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(two)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    module, optimiser = make(True)
    train(module, optimiser, range(3))
    weights, states = gather(module, optimiser)
    train(module, optimiser, range(3, 6))
    straight, _ = gather(module, optimiser)
    other, fresh = make(True)
    kept = [weights, states]  # whole on the main process only
    dist.broadcast_object_list(kept)
    set_model_state_dict(other, dict(kept[0]), options=StateDictOptions(full_state_dict=True))
    restore_optimiser(other, fresh, kept[1])
    train(other, fresh, range(3, 6))
    resumed, _ = gather(other, fresh)
    alone, own = make(False)
    train(alone, own, range(6))
    if dist.get_rank() == 0:
        sizes = {name: len(state) for name, state in states.items()}
        print(
            json.dumps(
                {
                    "resumed": farthest(straight, resumed),
                    "alone": farthest(straight, alone.state_dict()),
                    "moved": farthest(straight, weights),
                    "states": sizes,
                }
            )
        )
    dist.destroy_process_group()
