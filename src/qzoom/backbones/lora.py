"""LoRA matrices that belong to a base: W' = W + scale * B A with A (rank, in), B (out, rank), scale = alpha / rank.

The sum is taken in float32 and rounded once. Only plain LoRA on the decoder's linear maps is understood; the other
variants of PEFT are refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qzoom.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAPS = r"(?:self_attn|mlp|linear_attn|mlp\.shared_expert)\.(?:\w+_proj|in_proj_(?:qkv|z))"
_NAME = re.compile(rf"base_model\.model\.(?:(?:model|language_model)\.)*(layers\.\d+\.{_MAPS})\.lora_([AB])\.weight")
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
    """The matrices and what they belong to (CheckpointError: settings or names that are no plain LoRA of the
    decoder)."""

    base_weights: str  # `checkpoints.weights.maps_digest` of the base's linear maps that they are added to
    settings: Mapping[str, Any]  # PEFT's `adapter_config.json`
    tensors: Mapping[str, Tensor]  # A and B of every map, under PEFT's names

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
            wrong = (strange or unpaired or ["nothing"])[0]
            raise CheckpointError(f"The LoRA weights hold {wrong}, not pairs of matrices of the decoder's linear maps.")
        if len(self.tensors) > 2 * len(self._pairs()):
            kept = {name for pair in self._pairs().values() for name in pair.values()}
            twice = min(name for name in self.tensors if name not in kept)
            raise CheckpointError(f"The LoRA weights hold two matrices for one map, one of them {twice}; keep one.")

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
        """A map's weight (out, in) with its matrices added, in the weight's own number format (CheckpointError: the
        matrices have another shape)."""
        down, up, scale = self.matrices(target, weight.device)
        rank = self.settings["r"]
        if down.shape != (rank, weight.shape[1]) or up.shape != (weight.shape[0], rank):
            raise CheckpointError(
                f"The LoRA weights of {target} have shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not fit "
                f"the base's {tuple(weight.shape)} at rank {rank}; they belong to another base model."
            )
        return (weight.float() + (up.float() @ down.float()) * scale).to(weight.dtype)

    def matrices(self, target: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """A (rank, in), B (out, rank) and the scale of a map."""
        names = self._pairs()[target]
        down, up = (self.tensors[names[side]].to(device) for side in "AB")
        return down, up, self.settings["lora_alpha"] / self.settings["r"]

    def check(self, digest: str, where: str) -> None:
        """Compare with the digest of the base that is at hand (CheckpointError: it is another base)."""
        if digest != self.base_weights:
            raise CheckpointError(
                f"The LoRA weights of {where} were trained on another base (weights {self.base_weights}, not "
                f"{digest}); load them with the very base that they were trained on."
            )

    def _pairs(self) -> dict[str, dict[str, str]]:
        pairs: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            match = _NAME.fullmatch(name)
            if match:
                pairs.setdefault(match[1], {})[match[2]] = name
        return pairs
