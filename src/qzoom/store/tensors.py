"""Tensors of a store: one small file per sample while it is young, gathered into shards of many.

A file appears under its name complete or not at all, so a killed writer leaves at most a `.tmp` file or tensors that no
record names; both are removed when the store is next opened for writing.

    tensors/part-00-000000412.safetensors       one sample: "<record id>.<tensor>"
    tensors/shard-00-000001.safetensors         gathered parts of writer 00
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qzoom.errors import DataError

__all__ = ["GATHER", "TensorFiles", "sync_folder", "write_synced"]


GATHER = 256
"""Samples per shard."""
_MAX_HEADER = 100_000_000


class TensorFiles:
    """All tensor files of a store's folder.

    Args:
        folder: the store's `tensors` folder.
        writer: number of this writer; None only reads.
    """

    def __init__(self, folder: Path, writer: int | None = None) -> None:
        self._folder = folder
        self._writer = writer
        self._where: dict[str, Path] = {}
        self._parts: list[Path] = []
        self._next = 0
        if folder.is_dir():
            # A part whose tensors are also in a shard was gathered but not yet removed: shards come last and win.
            for path in sorted(folder.glob("*.safetensors")):
                self._where.update(dict.fromkeys(_keys(path), path))

    def tidy(self, known: Iterable[str]) -> None:
        """Remove this writer's leftovers: unfinished files, tensors of no record, parts that a shard holds.

        Args:
            known: ids of the records that exist.
        """
        records = set(known)
        for path in self._folder.glob(f"*-{self._writer:02d}-*.tmp"):
            path.unlink(missing_ok=True)
        for path in sorted(self._folder.glob(f"part-{self._writer:02d}-*.safetensors")):
            keys = _keys(path)
            held = [key for key in keys if self._where.get(key) == path and key.split(".")[0] in records]
            if held:
                self._parts.append(path)
            else:
                path.unlink()
                for key in keys:
                    if self._where.get(key) == path:
                        del self._where[key]
        numbers = [int(path.stem.split("-")[2]) for path in self._parts]
        self._next = max(numbers, default=-1) + 1

    def write(self, tensors: dict[str, np.ndarray]) -> None:
        """Write one sample's tensors, named "<record id>.<tensor>"."""
        if not tensors:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"part-{self._writer:02d}-{self._next:09d}.safetensors"
        _save(path, tensors)
        self._next += 1
        self._parts.append(path)
        self._where.update(dict.fromkeys(tensors, path))

    def gather(self, least: int = GATHER) -> None:
        """Join the parts into one shard when there are at least `least` of them."""
        if not self._parts or len(self._parts) < least:
            return
        tensors: dict[str, np.ndarray] = {}
        for path in self._parts:
            tensors |= _load(path)
        taken = [int(p.stem.split("-")[2]) for p in self._folder.glob(f"shard-{self._writer:02d}-*.safetensors")]
        shard = self._folder / f"shard-{self._writer:02d}-{max(taken, default=0) + 1:06d}.safetensors"
        _save(shard, tensors)
        self._where.update(dict.fromkeys(tensors, shard))
        for path in self._parts:
            path.unlink()
        self._parts = []

    def read(self, key: str) -> np.ndarray:
        """One tensor.

        Raises:
            DataError: no file holds it.
        """
        from safetensors import safe_open

        if key not in self._where:
            raise DataError(f"{self._folder} lacks the tensor {key}; restore the missing file or label again.")
        with safe_open(self._where[key], "np") as file:
            return np.asarray(file.get_tensor(key))

    def __contains__(self, key: str) -> bool:
        return key in self._where


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, and is on the disk when this returns."""
    partial = path.with_suffix(".tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    write_synced(path, save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))


def _load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _keys(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MAX_HEADER:
                raise ValueError
            header = json.loads(file.read(size))
        return [name for name in header if name != "__metadata__"]
    except FileNotFoundError:
        return []  # another writer has just gathered it
    except (OSError, ValueError, struct.error) as error:
        raise DataError(f"{path} is no readable safetensors file; restore it or label again with --fresh.") from error
