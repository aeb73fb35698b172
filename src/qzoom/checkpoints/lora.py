"""LoRA matrices that travel with an adapter: a subfolder in PEFT's format, added to the base when it is loaded.

PEFT can load the subfolder by itself, but is not needed to answer: safetensors and JSON suffice, and `qzoom convert`
adds the matrices file by file without building a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom.backbones.lora import LoraWeights
from qzoom.checkpoints.weights import check_finite, maps_digest, read_json
from qzoom.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from qzoom.backbones.base import Backbone

LORA_FOLDER = "lora"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_to_backbone(backbone: Backbone, lora: LoraWeights, where: str) -> None:
    """Add the matrices to a loaded base; the caller keeps them on its `Engine`, so that adapters saved later have them.

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


def weight_in(backbone: Backbone, target: str, where: str) -> Tensor:
    """The weight of a map, by its name in `LoraWeights.targets` (CheckpointError: the base has no such map)."""
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
        CheckpointError: files missing or damaged, NaN or infinity, or no plain LoRA.
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
    check_finite(tensors.items(), str(inner / _WEIGHTS))
    return LoraWeights(base_weights, settings, tensors)
