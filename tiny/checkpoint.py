"""The training state on disk: master weights, optimiser state and counters in one safetensors file.

The file is written beside the old one and takes its place in one move once it is on the disk, so a process that is
killed at any time leaves either the old state or the new one. Numbers that are not tensors travel as JSON in the file's
header, and so do the settings that decided them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoom.errors import CheckpointError, DataError, reason_of
from qzoom.store.log import atomic_path, unwritable
from qzoom.training.optim import MuonWithAdamW, split_matrices


class MasterWeights:
    """Float32 copies of a module's weights, which the optimiser updates while the module itself computes in bfloat16.

    Args:
        module: its parameters are the working copies; tied ones count once.
        rates: learning rates of Muon (matrices inside the towers) and AdamW (all else) at factor 1.
        weight_decay: of the matrices.
    """

    def __init__(self, module: nn.Module, rates: tuple[float, float], weight_decay: float) -> None:
        self._working = dict(module.named_parameters())
        self.weights = {
            name: nn.Parameter(weight.detach().to(torch.float32, copy=True)) for name, weight in self._working.items()
        }
        groups: list[list[dict[str, Any]]] = []
        self._rates: list[tuple[float, bool]] = []
        in_decoder = {id(weight): "language_model" in name for name, weight in self.weights.items()}
        for weights, rate in zip(split_matrices(self.weights.items()), rates, strict=True):
            runs = [(key, list(run)) for key, run in itertools.groupby(weights, key=lambda w: in_decoder[id(w)])]
            groups.append([{"params": run} for _, run in runs])
            self._rates += [(rate, key) for key, _ in runs]
        self.optimizer = MuonWithAdamW(
            groups[0],
            groups[1],
            lr=rates[0],
            weight_decay=weight_decay,
            betas=(0.9, 0.98),
        )

    def collect(self) -> None:
        """Add the working copies' gradients to the masters' and clear them."""
        for name, weight in self._working.items():
            if weight.grad is None:
                continue
            master = self.weights[name]
            if master.grad is None:
                master.grad = weight.grad.to(torch.float32)
            else:
                master.grad += weight.grad
            weight.grad = None

    def step(self, factor: float, decoder_factor: float, clip_norm: float) -> float:
        """One update at this learning-rate factor, the decoder's once more by its own; returns the norm of the
        gradient before it was clipped."""
        norm = nn.utils.clip_grad_norm_(
            [weight for weight in self.weights.values() if weight.grad is not None], clip_norm
        )
        for group, (rate, decoder) in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor * (decoder_factor if decoder else 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.publish()
        return float(norm)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the working weights."""
        for name, weight in self._working.items():
            weight.copy_(self.weights[name])


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises while `path` is written into one sentence (CheckpointError)."""
    from safetensors import SafetensorError

    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(unwritable(path, error))) from error


def save_state(path: Path, masters: MasterWeights, counters: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Write everything that a run needs to go on, with the settings that decided it (CheckpointError: the disk
    refuses; an earlier state is left)."""
    from safetensors.torch import save_file

    tensors = {f"weight/{name}": weight.detach().cpu() for name, weight in masters.weights.items()}
    state = masters.optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{number}/{key}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(number), {})[key] = value
    header = {"state": json.dumps({"counters": counters, "plain": plain}), "settings": json.dumps(dict(settings))}
    with writing(path), atomic_path(path) as part:
        save_file(tensors, part, metadata=header)


def load_state(path: Path, masters: MasterWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore what `save_state` wrote and return its counters and settings, both empty where there is no state yet;
    states of earlier versions have no settings.

    Raises:
        CheckpointError: the state belongs to another model, or is damaged.
    """
    from safetensors import SafetensorError

    if not path.is_file():
        return {}, {}
    try:
        return _restore(path, masters)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({reason_of(error)}); restore it from a copy, or start over with --fresh."
        ) from error


def _restore(path: Path, masters: MasterWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        header = json.loads(metadata["state"])
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names if name.startswith("weight/")}
        if shapes != {f"weight/{name}": tuple(weight.shape) for name, weight in masters.weights.items()}:
            raise CheckpointError(f"{path} belongs to a model of other sizes; give another folder or --fresh.")
        with torch.no_grad():
            for name, weight in masters.weights.items():
                weight.copy_(file.get_tensor(f"weight/{name}"))
        state: dict[int, dict[str, Any]] = {int(n): dict(values) for n, values in header["plain"].items()}
        for name in names:
            if name.startswith("optimizer/"):
                _, number, key = name.split("/", 2)
                state.setdefault(int(number), {})[key] = file.get_tensor(name)
    groups = masters.optimizer.state_dict()["param_groups"]
    masters.optimizer.load_state_dict({"state": state, "param_groups": groups})
    masters.publish()
    return dict(header["counters"]), dict(json.loads(metadata.get("settings", "{}")))
