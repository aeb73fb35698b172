"""A trained model as a folder that transformers loads: bf16 weights, tokenizer, template, image processor settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.training.tiny import PATCH_PX, TOKEN_PX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

__all__ = ["export_model", "load_weights"]


def export_model(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model to `folder` (bf16 safetensors); an earlier one there is replaced in one move."""
    import copy

    import torch
    from safetensors.torch import save_file

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    (part / "model.safetensors").chmod(0o644)
    config = copy.deepcopy(model.config)
    pieces: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for piece in pieces:
        piece._attn_implementation = None
        piece.dtype = torch.bfloat16
    config.save_pretrained(part)
    model.generation_config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_weights(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Give `model` the weights that `export_model` wrote to `folder`; other sizes or names are a `ConfigError`."""
    import torch
    from safetensors.torch import load_file

    from qzoom.errors import ConfigError

    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"start_from: {folder} holds no model.safetensors; give the folder of an exported model.")
    weights = {name: weight.to(torch.float32) for name, weight in load_file(path).items()}
    own = {name: weight.shape for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    if {name: weight.shape for name, weight in weights.items()} != own:
        raise ConfigError(
            f"start_from: the weights in {folder} belong to another architecture or vocabulary than the recipe's."
        )
    model.load_state_dict(weights, strict=False)


_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH_PX,
    "merge_size": TOKEN_PX // PATCH_PX,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_convert_rgb": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": TOKEN_PX * TOKEN_PX, "longest_edge": 1024 * TOKEN_PX * TOKEN_PX},
}
