"""What decides an evaluation's answers, as JSON values, so that a run is never continued by another model.

Weights are told apart by a digest of values taken from every tensor, which costs little even for large models.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qzoom.engine.state import Engine
    from qzoom.model import QZoom

__all__ = ["describe_model", "describe_software", "weights_digest"]

_VALUES_PER_TENSOR = 512


def describe_model(model: QZoom) -> dict[str, Any]:
    """Weights digest, arithmetic, number format, kind of device and attention of a model."""
    backbone = model.engine.backbone
    return {
        "weights": weights_digest(model.engine),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "attention": str(backbone.model.config._attn_implementation),
        "config": model.config.to_dict(),
    }


def describe_software(model: QZoom) -> dict[str, Any]:
    """What ran, for the reader: the model's name and sizes and the versions of the libraries."""
    import torch
    import transformers

    import qzoom
    from qzoom.evaluation.flops import shape_of

    return {
        "model": model.name,
        "shape": shape_of(model.engine).to_dict(),
        "qzoom": qzoom.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def weights_digest(engine: Engine) -> str:
    """Sixteen hex digits that change with the weights of the backbone, the gate or the region branch."""
    import torch

    digest = hashlib.sha256()
    parts: list[tuple[str, torch.nn.Module | None]] = [
        ("base", engine.backbone.model),
        ("gate", engine.gate),
        ("region", engine.region),
    ]
    for part, module in parts:
        if module is None:
            continue
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // _VALUES_PER_TENSOR)
            digest.update(f"{part}.{name}{tuple(tensor.shape)}".encode())
            digest.update(flat[::step].to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
