"""LoRA matrices that travel with an adapter: a subfolder in PEFT's format, added to the base when it is loaded.

PEFT can load the subfolder by itself, but is not needed to answer: safetensors and JSON suffice, and `qzoom convert`
adds the matrices file by file without building a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom.backbones.lora import LoraWeights
from qzoom.checkpoints.branches import decoder_prefix
from qzoom.checkpoints.weights import check_finite, maps_digest, read_index, read_json, read_tensors
from qzoom.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qzoom.backbones.base import Backbone

LORA_FOLDER = "lora"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_to_backbone(backbone: Backbone, lora: LoraWeights, where: str) -> None:
    """Add the matrices to a loaded base; the caller keeps them on its `Engine`, so that adapters saved later have them.

    Args:
        backbone: in float32 or bfloat16; its decoder is changed in place.

    Raises:
        CheckpointError: another base, or a number format in which that cannot be told.
    """
    import torch

    from qzoom.backbones.quantized import add_beside, is_quantized_map

    if backbone.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"{where} has LoRA weights, which load in float32 or bfloat16 only; choose one of them.")
    lora.check(base_maps_digest(backbone, lora.targets, where), where)
    with torch.no_grad():
        for target in lora.targets:
            module = _map_in(backbone, target, where)
            if is_quantized_map(module):
                add_beside(module, *lora.matrices(target, backbone.device))
            else:
                weight: Tensor = module.weight  # type: ignore[assignment]
                weight.copy_(lora.added(target, weight))


def base_maps_digest(backbone: Backbone, targets: Sequence[str], where: str) -> str:
    """`weights.maps_digest` of a loaded base: of a quantised one the maps in the files that it was loaded from.

    So the same matrices fit a base in 4 bit, in 8 bit and in full precision (CheckpointError: the base has no such map,
    or a quantised one came from no folder).
    """
    from qzoom.backbones.quantized import is_quantized_map

    if not any(is_quantized_map(_map_in(backbone, target, where)) for target in targets):
        return maps_digest(targets, lambda target: _map_in(backbone, target, where).weight)  # type: ignore[return-value, arg-type]
    if backbone.folder is None:
        raise CheckpointError(f"{where}: a quantised base that was not loaded from a folder takes no LoRA weights.")
    index = read_index(backbone.folder)
    prefix = decoder_prefix(index)
    names = {target: f"{prefix}{target}.weight" for target in targets}
    return maps_digest(targets, lambda target: read_tensors(index, [names[target]])[names[target]])


def _map_in(backbone: Backbone, target: str, where: str) -> nn.Module:
    """A linear map, by its name in `LoraWeights.targets` (CheckpointError: the base has no such map)."""
    number, inner = target.removeprefix("layers.").split(".", 1)
    try:
        return backbone.layers[int(number)].get_submodule(inner)
    except (AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{where}: the base has no {target}, to which LoRA weights are to be added; it is another base model."
        ) from error


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
    """The LoRA weights of an adapter's folder (CheckpointError: files missing or damaged, NaN or infinity, or no plain
    LoRA). `base_weights`: what its config says that they belong to."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    inner = folder / LORA_FOLDER
    settings = read_json(inner / _CONFIG)
    try:
        tensors = load_file(inner / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{inner / _WEIGHTS} cannot be read ({reason_of(error)}); fetch the file again."
        ) from error
    check_finite(tensors.items(), str(inner / _WEIGHTS))
    return LoraWeights(base_weights, settings, tensors)
