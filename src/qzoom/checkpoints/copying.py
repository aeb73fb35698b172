"""Copies of weight files with tensors left out, renamed or added, bit by bit and one file at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.weights import WeightIndex, read_json, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_FILE_BYTES", "Copy", "copy_weights", "merge_weights"]

Place = tuple[WeightIndex, str]
Change = Callable[["Tensor"], "Tensor"]
MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Copy:
    """How much was copied.

    Args:
        tensors: how many.
        size_bytes: their size.
    """

    tensors: int = 0
    size_bytes: int = 0

    def __add__(self, other: Copy) -> Copy:
        return Copy(self.tensors + other.tensors, self.size_bytes + other.size_bytes)

    @property
    def counts(self) -> tuple[int, int]:
        """Both numbers."""
        return self.tensors, self.size_bytes


def copy_weights(
    index: WeightIndex, names: Mapping[str, str], target: Path, stem: str, max_file_bytes: int = MAX_FILE_BYTES
) -> Copy:
    """Copy some tensors into a folder, into one file or into numbered ones with an index.

    Args:
        index: where they are.
        names: new names to present ones.
        target: folder to write to.
        stem: file name without its ending.
        max_file_bytes: above this, a further file is begun.
    """
    pieces: list[dict[str, Place]] = [{}]
    filled = 0
    for new, old in sorted(names.items()):
        size = _size({new: (index, old)}).size_bytes
        if pieces[-1] and filled + size > max_file_bytes:
            pieces.append({})
            filled = 0
        pieces[-1][new] = (index, old)
        filled += size
    if len(pieces) == 1:
        return _write_file(pieces[0], target / f"{stem}.safetensors", {"format": "pt"})
    files = [f"{stem}-{i + 1:05d}-of-{len(pieces):05d}.safetensors" for i in range(len(pieces))]
    done = Copy()
    for file, places in zip(files, pieces, strict=True):
        done += _write_file(places, target / file, {"format": "pt"})
    weight_map = {name: file for file, places in zip(files, pieces, strict=True) for name in places}
    listing = {"metadata": {"total_size": done.size_bytes}, "weight_map": weight_map}
    text = json.dumps(listing, indent=2, sort_keys=True) + "\n"
    (target / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return done


def merge_weights(
    base: WeightIndex,
    names: Sequence[str],
    added: Mapping[str, Place],
    files: Mapping[str, str],
    target: Path,
    changes: Mapping[str, Change] | None = None,
) -> Copy:
    """Copy a base model's tensors, each into the file it was in, and add others.

    Args:
        base: the base model.
        names: which of its tensors.
        added: new tensors by their names in the target, with where to take them from.
        files: the file of each new tensor, for sharded bases; those not named go into a file of their own.
        target: folder to write to.
        changes: what to make of some of the base's tensors instead of copying them.
    """
    changes = changes or {}
    by_file: dict[str, dict[str, Place]] = {}
    for name in names:
        by_file.setdefault(base.tensors[name].file, {})[name] = (base, name)
    fallback = f"{base.stem}-branches.safetensors" if base.sharded else f"{base.stem}.safetensors"
    for name, place in added.items():
        file = files.get(name, fallback) if base.sharded else fallback
        by_file.setdefault(Path(file).name, {})[name] = place
    done = Copy()
    for file, places in sorted(by_file.items()):
        metadata = base.metadata.get(file, {"format": "pt"})
        whole = sorted(places) == base.names_in(file) and all(place == (base, n) for n, place in places.items())
        if whole and not changes.keys() & places.keys():
            shutil.copyfile(base.folder / file, target / file)
            done += _size(places)
        else:
            done += _write_file(places, target / file, metadata, changes)
    if base.sharded:
        _write_listing(base, by_file, done, target)
    return done


def _write_file(
    places: Mapping[str, Place],
    path: Path,
    metadata: dict[str, str] | None,
    changes: Mapping[str, Change] | None = None,
) -> Copy:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for index in {id(place[0]): place[0] for place in places.values()}.values():
        mine = {new: old for new, (where, old) in places.items() if where is index}
        read = read_tensors(index, set(mine.values()))
        for new, old in mine.items():
            tensors[new] = read.pop(old) if old in read else tensors[_taken(mine, old)].clone()
    for name, change in (changes or {}).items():
        if name in tensors:
            tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata=metadata)
    return _size(places)


def _taken(renamed: Mapping[str, str], old: str) -> str:
    """The first of the new names that a tensor goes under."""
    return next(new for new, source in renamed.items() if source == old)


def _size(places: Mapping[str, Place]) -> Copy:
    infos = [index.tensors[name] for index, name in places.values()]
    return Copy(len(infos), sum(math.prod(info.shape) * _bits(info.dtype) // 8 for info in infos))


def _bits(dtype: str) -> int:
    """Bits of one value, from safetensors' name of the format, e.g. 16 for "BF16" and 8 for "F8_E4M3"."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) if digits else 8


def _write_listing(base: WeightIndex, by_file: Mapping[str, Mapping[str, Any]], done: Copy, target: Path) -> None:
    name = f"{base.stem}.safetensors.index.json"
    listing = read_json(base.folder / name)
    about = dict(listing.get("metadata") or {})
    about["total_size"] = done.size_bytes
    if "total_parameters" in about:
        about["total_parameters"] = sum(
            math.prod(index.tensors[old].shape) for places in by_file.values() for index, old in places.values()
        )
    places = {tensor: file for file, inside in by_file.items() for tensor in inside}
    listing |= {"metadata": about, "weight_map": dict(sorted(places.items()))}
    (target / name).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n", encoding="utf-8")
