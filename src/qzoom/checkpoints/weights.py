"""Tensors in safetensors files: read by name, copied file by file, and digested.

Only safetensors are read. What a folder holds is known from file headers, so that shapes can be checked and single
tensors taken before (or without) building a model. Copies leave tensors out, rename or add them, bit by bit and one
file at a time. Digests tell which weights an answer, a label or an adapter belongs to.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import CheckpointError, listed, reason_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qzoom.engine.state import Engine


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it looks like."""

    file: str  # file name inside the folder
    dtype: str  # safetensors' name of the number format, e.g. "BF16".
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """All tensors of one set of weights in a folder."""

    folder: Path
    stem: str  # "model" for model.safetensors or its shards
    tensors: Mapping[str, TensorInfo]  # name to place and shape
    metadata: Mapping[str, dict[str, str] | None]  # file name to the file's own text metadata
    sharded: bool  # whether there is an index file

    @property
    def files(self) -> list[str]:
        """File names in order."""
        return sorted(self.metadata)

    def names_in(self, file: str) -> list[str]:
        """Tensor names of one file, in order."""
        return sorted(name for name, info in self.tensors.items() if info.file == file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file (CheckpointError: missing, not JSON, or not an object)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}; it is not a complete checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({reason_of(error)}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}; fetch the file again.")
    return value


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it holds {word}, which is no number")


def read_index(folder: Path, stem: str = "model") -> WeightIndex:
    """What `STEM.safetensors` or `STEM.safetensors.index.json` and its shards hold.

    Args:
        folder: the checkpoint's folder.
        stem: "model" for a model's weights, "qzoom" for our branches.

    Raises:
        CheckpointError: no safetensors (pickled weights are refused), a shard missing, a damaged file, or two complete
            sets of weights.
    """
    single, listing = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    wanted = _weight_map(listing) if listing.is_file() else None
    if wanted is not None and single.is_file() and _is_left_over(folder, single.name, wanted):
        wanted = None
    if wanted is not None:
        files = sorted(set(wanted.values()))
    elif single.is_file():
        files = [single.name]
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
            raise CheckpointError(
                f"{listing} names {listed(lost)}, which its files do not hold; fetch the files again."
            )
    return WeightIndex(folder, stem, tensors, metadata, wanted is not None)


def read_tensors(index: WeightIndex, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
    """Some tensors, as stored."""
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
        raise CheckpointError(f"{path} is damaged or cut short ({reason_of(error)}); fetch the file again.") from error


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    plain = isinstance(found, dict) and all(
        isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors") for file in found.values()
    )
    if not found or not plain:
        raise CheckpointError(f"{path} has no usable weight_map of tensor names to safetensors files in its folder.")
    return found


def _is_left_over(folder: Path, single: str, weight_map: Mapping[str, str]) -> bool:
    """Whether an index of shards was left by an earlier model over which a single file was saved (CheckpointError: its
    shards are all there, so that nobody can tell which weights are meant)."""
    shards = sorted(set(weight_map.values()) - {single})
    if single in weight_map.values():
        return False
    if all((folder / shard).is_file() for shard in shards):
        raise CheckpointError(
            f"{folder} holds two sets of weights, {single} and the shards of {single}.index.json ({listed(shards)}); "
            "delete the one that is not meant."
        )
    return True


def _no_weights(folder: Path, stem: str) -> str:
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickled:
        return (
            f"{folder} has only pickled weights ({listed(pickled)}), which can run code when opened; "
            "convert them to safetensors first."
        )
    return f"{folder} has no {stem}.safetensors; only checkpoints with safetensors weights can be loaded."


Place = tuple[WeightIndex, str]
Change = Callable[["Tensor"], "Tensor"]
MAX_FILE_BYTES = 5_000_000_000


Copied = tuple[int, int]
"""How many tensors were copied, and their bytes."""


def read_places(places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Tensors of any folders by their new names, none in the memory of another."""
    tensors: dict[str, Tensor] = {}
    for index in {id(place[0]): place[0] for place in places.values()}.values():
        mine = {new: old for new, (where, old) in places.items() if where is index}
        read = read_tensors(index, set(mine.values()))
        for new, old in mine.items():
            tensors[new] = read[old] if list(mine.values()).count(old) == 1 else read[old].clone()
    return tensors


def copy_weights(
    places: Mapping[str, Place],
    target: Path,
    stem: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    changes: Mapping[str, Change] | None = None,
) -> Copied:
    """Copy some tensors into a folder, into one file or into numbered ones with an index.

    Args:
        places: new names to where the tensors are.
        stem: file name without its ending.
        max_file_bytes: above this, a further file is begun.
        changes: what to make of some of them, by their new names.
    """
    pieces: list[dict[str, Place]] = [{}]
    filled = 0
    for new, place in sorted(places.items()):
        size = _size({new: place})[1]
        if pieces[-1] and filled + size > max_file_bytes:
            pieces.append({})
            filled = 0
        pieces[-1][new] = place
        filled += size
    done = _size(places)
    if len(pieces) == 1:
        _write_file(places, target / f"{stem}.safetensors", {"format": "pt"}, changes)
        return done
    files = [f"{stem}-{i + 1:05d}-of-{len(pieces):05d}.safetensors" for i in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        _write_file(piece, target / file, {"format": "pt"}, changes)
    weight_map = {name: file for file, places in zip(files, pieces, strict=True) for name in places}
    listing = {"metadata": {"total_size": done[1]}, "weight_map": weight_map}
    text = json.dumps(listing, indent=2, sort_keys=True) + "\n"
    (target / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return done


def merge_weights(
    base: WeightIndex,
    names: Sequence[str],
    target: Path,
    *,
    added: Mapping[str, Place] | None = None,
    files: Mapping[str, str] | None = None,
    changes: Mapping[str, Change] | None = None,
) -> Copied:
    """Copy a base model's tensors, each into the file it was in, and add others.

    Args:
        added: new tensors by their names in the target, with where to take them from.
        files: the file of each new tensor, for sharded bases; those not named go into a file of their own.
        changes: what to make of some of the base's tensors instead of copying them.
    """
    added, files, changes = added or {}, files or {}, changes or {}
    by_file: dict[str, dict[str, Place]] = {}
    for name in names:
        by_file.setdefault(base.tensors[name].file, {})[name] = (base, name)
    fallback = f"{base.stem}-branches.safetensors" if base.sharded else f"{base.stem}.safetensors"
    for name, place in added.items():
        file = files.get(name, fallback) if base.sharded else fallback
        by_file.setdefault(Path(file).name, {})[name] = place
    for file, places in sorted(by_file.items()):
        metadata = base.metadata.get(file, {"format": "pt"})
        whole = sorted(places) == base.names_in(file) and all(place == (base, n) for n, place in places.items())
        if whole and not changes.keys() & places.keys():
            shutil.copyfile(base.folder / file, target / file)
        else:
            _write_file(places, target / file, metadata, changes)
    done = _size({name: place for places in by_file.values() for name, place in places.items()})
    if base.sharded:
        _write_listing(base, by_file, done[1], target)
    return done


def _write_file(
    places: Mapping[str, Place],
    path: Path,
    metadata: dict[str, str] | None,
    changes: Mapping[str, Change] | None = None,
) -> None:
    from safetensors.torch import save_file

    tensors = read_places(places)
    for name, change in (changes or {}).items():
        if name in tensors:
            tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata=metadata)


def _size(places: Mapping[str, Place]) -> Copied:
    infos = [index.tensors[name] for index, name in places.values()]
    return len(infos), sum(math.prod(info.shape) * _bits(info.dtype) // 8 for info in infos)


def _bits(dtype: str) -> int:
    """Bits of one value, from safetensors' name of the format, e.g. 16 for "BF16" and 8 for "F8_E4M3"."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return int(digits) if digits else 8


def _write_listing(base: WeightIndex, by_file: Mapping[str, Mapping[str, Any]], size_bytes: int, target: Path) -> None:
    name = f"{base.stem}.safetensors.index.json"
    listing = read_json(base.folder / name)
    about = dict(listing.get("metadata") or {})
    about["total_size"] = size_bytes
    if "total_parameters" in about:
        about["total_parameters"] = sum(
            math.prod(index.tensors[old].shape) for places in by_file.values() for index, old in places.values()
        )
    places = {tensor: file for file, inside in by_file.items() for tensor in inside}
    listing |= {"metadata": about, "weight_map": dict(sorted(places.items()))}
    (target / name).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_finite(
    tensors: Iterable[tuple[str, Tensor]],
    where: str,
    place_of: Callable[[str], str] = str,
    *,
    remedy: str = "fetch the file again",
) -> None:
    """Refuse weights that are not all numbers. A look at the extremes costs about a second per 8 GB on one CPU core.

    Args:
        tensors: names and weights; those of whole numbers and of 8-bit formats pass.
        remedy: what to do about it.

    Raises:
        CheckpointError: NaN or infinity; it names the tensor.
    """
    import torch

    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            least, most = (float(value) for value in torch.aminmax(tensor.detach()))  # NaN if there is one
            if not (math.isfinite(least) and math.isfinite(most)):
                kind = str(tensor.dtype).removeprefix("torch.")
                advice = "or load it in bfloat16 or float32, if that is too small for it" if kind == "float16" else ""
                raise CheckpointError(
                    f"{where}: {place_of(name)} holds values that are not numbers (NaN or infinity) in {kind}; {remedy}"
                    f"{', ' * bool(advice)}{advice}."
                )


_VALUES_PER_TENSOR = 512
_ENDS = 64


def weights_digest(engine: Engine) -> str:
    """Sixteen hex digits that change with the weights of the backbone, the gate or the region branch.

    It takes some values of every tensor, so that it costs little even for large models.
    """
    import torch

    digest = hashlib.sha256()
    parts = (("base", engine.backbone.model), ("gate", engine.gate), ("region", engine.region))
    for part, module in parts:
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            digest.update(_some_values(tensor, torch.float64))
    return digest.hexdigest()[:16]


def base_digest(engine: Engine) -> str:
    """Digest of the base model's weights alone, whatever number format they were loaded in: what labels belong to.

    LoRA weights count as such, since their sum with the base's depends on the format that it is rounded to.
    """
    import torch

    lora, decoder = engine.lora, engine.backbone.decoder_name
    merged = () if lora is None else {f"{decoder}.{target}.weight" for target in lora.targets}
    digest = hashlib.sha256(b"" if lora is None else lora.digest.encode())
    for name, tensor in sorted(engine.backbone.model.state_dict().items()):
        if name not in merged:
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + _some_values(tensor, torch.bfloat16))
    return digest.hexdigest()[:16]


def file_digest(index: WeightIndex, names: Iterable[str]) -> str:
    """Sixteen hex digits of some tensors as they are stored: their names, sizes, first and last values; "" for none.

    Only a few pages of every file are read.
    """
    from safetensors import safe_open

    by_file: dict[str, list[str]] = {}
    for name in sorted(names):
        by_file.setdefault(index.tensors[name].file, []).append(name)
    digest = hashlib.sha256()
    for file, wanted in sorted(by_file.items()):
        with safe_open(index.folder / file, framework="pt") as handle:
            for name in wanted:
                flat = handle.get_tensor(name).reshape(-1)
                digest.update(f"{name} {index.tensors[name].dtype} {index.tensors[name].shape}".encode())
                for end in (flat[:_ENDS], flat[-_ENDS:]):
                    digest.update(end.float().numpy().tobytes())
    return digest.hexdigest()[:16] if by_file else ""


def maps_digest(targets: Iterable[str], weight_of: Callable[[str], Tensor]) -> str:
    """Sixteen hex digits of some weights, the same in float32 and bfloat16, in memory and in a file."""
    import torch

    digest = hashlib.sha256()
    for target in sorted(targets):
        weight = weight_of(target)
        digest.update(f"{target} {weight.numel()}".encode() + _some_values(weight, torch.bfloat16))
    return digest.hexdigest()[:16]


def _some_values(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """About 512 values, evenly spaced, rounded to a number format."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].to(dtype)
    return (some.float() if some.itemsize == 2 else some).cpu().numpy().tobytes()
