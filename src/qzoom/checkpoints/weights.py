"""Tensors in safetensors files by name, one file or many, read without loading the rest.

Only safetensors are read. What a folder holds is known from file headers, so that shapes can be checked and single
tensors taken before (or without) building a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorInfo", "WeightIndex", "read_index", "read_json", "read_tensors"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it looks like.

    Args:
        file: file name inside the folder.
        dtype: safetensors' name of the number format, e.g. "BF16".
        shape: its sizes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """All tensors of one set of weights in a folder.

    Args:
        folder: where the files are.
        stem: "model" for model.safetensors or its shards.
        tensors: name to place and shape.
        metadata: file name to the file's own text metadata.
        sharded: whether there is an index file.
    """

    folder: Path
    stem: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, dict[str, str] | None]
    sharded: bool

    @property
    def files(self) -> list[str]:
        """File names in order."""
        return sorted(self.metadata)

    def names_in(self, file: str) -> list[str]:
        """Tensor names of one file, in order."""
        return sorted(name for name, info in self.tensors.items() if info.file == file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a complete checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({_first_line(error)}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}; fetch the file again.")
    return value


def read_index(folder: Path, stem: str = "model") -> WeightIndex:
    """What `STEM.safetensors` or `STEM.safetensors.index.json` and its shards hold.

    Args:
        folder: the checkpoint's folder.
        stem: "model" for a model's weights, "qzoom" for our branches.

    Raises:
        CheckpointError: no safetensors (pickled weights are refused), a shard missing, a damaged file.
    """
    single, listing = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if listing.is_file():
        wanted = _weight_map(listing)
        files = sorted(set(wanted.values()))
    elif single.is_file():
        wanted, files = None, [single.name]
    else:
        raise CheckpointError(_no_weights(folder, stem))
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, dict[str, str] | None] = {}
    for file in files:
        found, metadata[file] = _read_header(folder / file)
        tensors |= found
    if wanted is not None:
        lost = sorted(name for name, file in wanted.items() if name not in tensors or tensors[name].file != file)
        if lost:
            raise CheckpointError(f"{listing} names {_list(lost)}, which its files do not hold; fetch the files again.")
    return WeightIndex(folder, stem, tensors, metadata, wanted is not None)


def read_tensors(index: WeightIndex, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
    """Some tensors, as stored.

    Args:
        index: where they are.
        names: which ones.
        device: where to put them.
    """
    from safetensors import safe_open

    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(index.tensors[name].file, []).append(name)
    out: dict[str, Tensor] = {}
    for file, wanted in by_file.items():
        with safe_open(index.folder / file, framework="pt", device=device) as handle:
            out |= {name: handle.get_tensor(name) for name in wanted}
    return out


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str] | None]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks the weight file {path.name}; fetch it again.")
    try:
        with safe_open(path, framework="pt") as handle:
            found = {}
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                piece = handle.get_slice(name)
                found[name] = TensorInfo(path.name, piece.get_dtype(), tuple(piece.get_shape()))
            return found, handle.metadata()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({_first_line(error)}); fetch the file again."
        ) from error


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    plain = isinstance(found, dict) and all(
        isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors") for file in found.values()
    )
    if not found or not plain:
        raise CheckpointError(f"{path} has no usable weight_map of tensor names to safetensors files in its folder.")
    return found


def _no_weights(folder: Path, stem: str) -> str:
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickled:
        return (
            f"{folder} has only pickled weights ({_list(pickled)}), which can run code when opened; "
            "convert them to safetensors first."
        )
    return f"{folder} has no {stem}.safetensors; only checkpoints with safetensors weights can be loaded."


def _list(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
