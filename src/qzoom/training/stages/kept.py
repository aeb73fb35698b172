"""A run's checkpoint: the weights that train, the optimiser's state and the step, in one safetensors file.

It is replaced as a whole, so a run that is killed at any point goes on from the last one, bit for bit as if it had not
been. The frozen base is not in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoom.errors import ConfigError, DataError

__all__ = ["Checkpoint", "check_same_run", "load_checkpoint", "save_checkpoint"]

NAME = "checkpoint.safetensors"
_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a run is.

    Args:
        step: optimiser steps done.
        run: what decides the run, as JSON values.
    """

    step: int
    run: dict[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, weights: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write it; an interrupted write leaves the one before.

    Args:
        folder: of the run.
        checkpoint: where the run is.
        weights: those that train, by name.
        states: the optimiser's state of each.

    Raises:
        DataError: the disk refuses.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
        for key, value in states[name].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    metadata = {"step": str(checkpoint.step), "run": json.dumps(checkpoint.run)}
    partial = folder / f"{NAME}.partial"
    try:
        save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, folder / NAME)
    except Exception as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(
            f"{folder / NAME} cannot be written ({reason}); check space and rights, then run again."
        ) from error


def load_checkpoint(
    folder: Path, weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, run: Mapping[str, Any]
) -> int:
    """Restore weights and optimiser; returns the steps done, 0 without a checkpoint.

    Raises:
        ConfigError: the checkpoint is of a run with other settings.
        DataError: it is damaged or of another model.
    """
    from safetensors import safe_open

    path = folder / NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            step, made = int(metadata["step"]), json.loads(metadata["run"])
            check_same_run(made, dict(run), folder)
            names = set(file.keys())
            wanted = {f"weight.{name}" for name in weights}
            if {name for name in names if name.startswith("weight.")} != wanted:
                raise DataError(f"{path} holds the weights of another model; use --fresh or another output.")
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(file.get_tensor(f"weight.{name}"))
                    state = {k: file.get_tensor(f"{k}.{name}") for k in _STATE if f"{k}.{name}" in names}
                    if state:
                        optimiser.state[weight] = {
                            key: value if key == "step" else value.to(weight.device) for key, value in state.items()
                        }
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read; restore it or start over with --fresh.") from error
    return step


def check_same_run(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings.

    Raises:
        ConfigError: it names what changed.
    """
    here = json.loads(json.dumps(here))
    changed = []
    for key in dict.fromkeys([*there, *here]):
        if there.get(key) != here.get(key):
            changed.append(f"{key} was {there.get(key)!r:.60}, is {here.get(key)!r:.60}")
    if changed:
        raise ConfigError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:3])}); use --fresh to replace it, or "
            "another output."
        )
