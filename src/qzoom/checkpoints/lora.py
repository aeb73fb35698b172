"""LoRA matrices that travel with an adapter: a subfolder in PEFT's format, added to the base when it is loaded.

PEFT can load the subfolder by itself. Here the sum is taken in float32 and rounded once, so nothing but safetensors and
JSON is needed to answer, and `qzoom convert` adds them file by file without building a model. Only plain LoRA on the
decoder's linear maps is understood; whatever else PEFT can do is refused.

    W' = W + scale * B A      A (rank, in), B (out, rank), scale = lora_alpha / rank
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.weights import read_json
from qzoom.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from qzoom.backbones.base import Backbone

__all__ = ["LORA_FOLDER", "LoraWeights", "add_to_backbone", "maps_digest", "read_lora", "write_lora"]

LORA_FOLDER = "lora"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?:.*\.)?(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.lora_([AB])\.weight")
_VALUES_PER_TENSOR = 512
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
}
"""PEFT's settings that change the sum, and the values that leave it as above."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """The matrices and what they belong to.

    Args:
        base_weights: `maps_digest` of the base's linear maps that they are added to.
        settings: PEFT's `adapter_config.json`.
        tensors: A and B of every map, under PEFT's names.

    Raises:
        CheckpointError: settings or names that are no plain LoRA of the decoder.
    """

    base_weights: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for key, allowed in _PLAIN.items():
            if self.settings.get(key) not in allowed:
                raise CheckpointError(
                    f"The LoRA weights have {key}={self.settings.get(key)!r}, which qzoom cannot add to a base; "
                    "merge them with the program that made them."
                )
        rank, alpha = self.settings.get("r"), self.settings.get("lora_alpha")
        if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float)):
            raise CheckpointError(f"The LoRA weights have r={rank!r} and lora_alpha={alpha!r}; both must be numbers.")
        strange = [name for name in self.tensors if not _NAME.fullmatch(name)]
        unpaired = [target for target, pair in self._pairs().items() if set(pair) != {"A", "B"}]
        if strange or unpaired or not self.tensors:
            found = (strange or unpaired or ["nothing"])[0]
            raise CheckpointError(f"The LoRA weights hold {found}, not pairs of matrices of the decoder's linear maps.")

    @property
    def targets(self) -> list[str]:
        """The maps, as "layers.0.self_attn.q_proj", in order."""
        return sorted(self._pairs())

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change with the base's maps, the settings that count, or the matrices."""
        digest = hashlib.sha256(f"{self.base_weights} {self.settings['r']} {self.settings['lora_alpha']}".encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def added(self, target: str, weight: Tensor) -> Tensor:
        """A map's weight (out, in) with its matrices added, in the weight's own number format.

        Raises:
            CheckpointError: the matrices have another shape.
        """
        names = self._pairs()[target]
        down, up = (self.tensors[names[side]].to(weight.device).float() for side in "AB")
        rank = self.settings["r"]
        if down.shape != (rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
            raise CheckpointError(
                f"The LoRA weights of {target} have shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not fit "
                f"the base's {tuple(weight.shape)} at rank {rank}; they belong to another base model."
            )
        return (weight.float() + (up @ down) * (self.settings["lora_alpha"] / rank)).to(weight.dtype)

    def check(self, found: str, where: str) -> None:
        """Compare with the digest of the base that is at hand.

        Raises:
            CheckpointError: it is another base.
        """
        if found != self.base_weights:
            raise CheckpointError(
                f"The LoRA weights of {where} were trained on another base (weights {self.base_weights}, not {found}); "
                "load them with the very base that they were trained on."
            )

    def _pairs(self) -> dict[str, dict[str, str]]:
        pairs: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            match = _NAME.fullmatch(name)
            if match:
                pairs.setdefault(match[1], {})[match[2]] = name
        return pairs


def maps_digest(targets: list[str], weight_of: Callable[[str], Tensor]) -> str:
    """Sixteen hex digits of some linear maps, the same in float32 and bfloat16, in memory and in a file.

    Args:
        targets: names as in `LoraWeights.targets`.
        weight_of: a map's weight by its name.
    """
    import torch

    digest = hashlib.sha256()
    for target in sorted(targets):
        flat = weight_of(target).detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].to(torch.bfloat16).float().cpu()
        digest.update(f"{target} {flat.numel()}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def add_to_backbone(backbone: Backbone, lora: LoraWeights, where: str) -> None:
    """Add the matrices to a loaded base, and note them on it, so that an adapter saved later carries them on.

    Args:
        backbone: in float32 or bfloat16; its decoder is changed in place.
        lora: what to add.
        where: the adapter, for error texts.

    Raises:
        CheckpointError: another base, or a number format in which that cannot be told.
    """
    import torch

    if backbone.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"{where} has LoRA weights, which load in float32 or bfloat16 only; choose one of them.")
    maps = {target: weight_in(backbone, target, where) for target in lora.targets}
    lora.check(maps_digest(lora.targets, maps.__getitem__), where)
    with torch.no_grad():
        for target, weight in maps.items():
            weight.copy_(lora.added(target, weight))
    backbone.lora = lora


def weight_in(backbone: Backbone, target: str, where: str) -> Tensor:
    """The weight of a map, by its name in `LoraWeights.targets`.

    Raises:
        CheckpointError: the base has no such map.
    """
    number, inner = target.removeprefix("layers.").split(".", 1)
    try:
        weight: Tensor = backbone.layers[int(number)].get_submodule(inner).weight  # type: ignore[assignment]
    except (AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{where}: the base has no {target}, to which LoRA weights are to be added; it is another base model."
        ) from error
    return weight


def write_lora(lora: LoraWeights, folder: Path) -> None:
    """Write PEFT's two files into a new subfolder of an adapter's."""
    from safetensors.torch import save_file

    inner = folder / LORA_FOLDER
    inner.mkdir()
    text = json.dumps(dict(lora.settings), indent=2, sort_keys=True) + "\n"
    (inner / _CONFIG).write_text(text, encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lora.tensors.items()}
    save_file(tensors, inner / _WEIGHTS, metadata={"format": "pt"})


def read_lora(folder: Path, base_weights: str) -> LoraWeights:
    """The LoRA weights of an adapter's folder.

    Args:
        folder: the adapter's.
        base_weights: what its config says that they belong to.

    Raises:
        CheckpointError: files missing or damaged, or no plain LoRA.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    inner = folder / LORA_FOLDER
    settings = read_json(inner / _CONFIG)
    try:
        tensors = load_file(inner / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        raise CheckpointError(f"{inner / _WEIGHTS} cannot be read ({reason}); fetch the file again.") from error
    return LoraWeights(base_weights, settings, tensors)
