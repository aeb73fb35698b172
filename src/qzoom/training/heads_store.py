"""Kept examples of head training: what the shared layers gave, and a label; one safetensors shard per few pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.prompt import Prompt, VisualSpan
from qzoom.engine.state import State

__all__ = ["BranchExample", "in_shards", "read_shard", "write_shard"]

SHARD_PICTURES = 25
Picture = TypeVar("Picture")


@dataclass(frozen=True, slots=True)
class BranchExample:
    """One question on one coarse look.

    Args:
        hidden: H_K, (length, hidden); kept in bfloat16.
        positions: (axes, length).
        start: index of the first visual token.
        grid: (rows, columns) of the coarse look.
        labels: region: (rows, columns) of the teacher's grid, 1, 0 or -100; gate: a scalar 1, 0 or -100.
        facts: what it was made of, for reports.
    """

    hidden: Tensor
    positions: Tensor
    start: int
    grid: tuple[int, int]
    labels: Tensor
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: State, labels: Tensor, facts: dict[str, Any]) -> BranchExample:
        """Take what is needed out of a state with one picture."""
        span = state.prompt.spans[0]
        positions = state.prompt.positions.to(torch.int32)
        return cls(state.hidden.to(torch.bfloat16), positions, span.start, span.features.grid, labels, facts)

    def state(self) -> State:
        """A state from which the branches can run, with gradients."""
        count = self.grid[0] * self.grid[1]
        features = VisualFeatures(torch.empty(count, 0), (), self.grid, (0, 0))
        prompt = Prompt(
            torch.zeros(self.hidden.shape[0], dtype=torch.long),
            self.positions.long(),
            (VisualSpan(self.start, features, 0, "coarse"),),
        )
        return State(prompt, self.hidden.float())


def write_shard(path: Path, examples: Sequence[BranchExample]) -> None:
    """Write atomically; an interrupted write leaves no shard behind."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    facts = []
    for i, example in enumerate(examples):
        tensors[f"{i}.hidden"] = example.hidden.clone()
        tensors[f"{i}.positions"] = example.positions.clone()
        tensors[f"{i}.labels"] = example.labels.to(torch.int16).clone()
        facts.append({"start": example.start, "grid": list(example.grid), "facts": example.facts})
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"examples": json.dumps(facts)})
    os.replace(partial, path)


def read_shard(path: Path) -> Iterator[BranchExample]:
    """The examples of a shard, in order."""
    from safetensors import safe_open

    with safe_open(path, "pt") as shard:
        for i, fact in enumerate(json.loads(shard.metadata()["examples"])):
            yield BranchExample(
                shard.get_tensor(f"{i}.hidden"),
                shard.get_tensor(f"{i}.positions"),
                fact["start"],
                (fact["grid"][0], fact["grid"][1]),
                shard.get_tensor(f"{i}.labels").long(),
                fact["facts"],
            )


def in_shards(
    pictures: Iterable[Picture],
    output: Path,
    stem: str,
    label: Callable[[Picture], list[BranchExample]],
    on_picture: Callable[[], None],
) -> None:
    """Label pictures and write their examples, one shard for every 25 pictures; shards that exist are skipped.

    Args:
        pictures: the same ones in the same order on every run.
        output: folder of the shards.
        stem: their names begin with it.
        label: makes the examples of a picture.
        on_picture: called after each picture.
    """
    held: list[BranchExample] = []
    path = output / f"{stem}-0.safetensors"
    for number, item in enumerate(pictures):
        path = output / f"{stem}-{number // SHARD_PICTURES}.safetensors"
        if not path.exists():
            held += label(item)
        on_picture()
        if number % SHARD_PICTURES == SHARD_PICTURES - 1 and held:
            write_shard(path, held)
            held = []
    if held:
        write_shard(path, held)
