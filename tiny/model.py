"""The embedded model's architecture and its first weights: Qwen3-VL, unforked, at a size that two cores can train.

`TinyArchitecture` states the sizes; `build_tiny` makes the model and draws its weights. The usual draw (standard
deviation 0.02 everywhere) leaves a small model at chance for tens of thousands of pictures, so weights are drawn with
the inverse root of their fan-in instead and what is added to the residual stream starts small. `use_fast_kernels`
makes training faster without changing a weight; `export_model` writes a folder that transformers loads, `load_weights`
reads one, `average_models` takes the mean of several.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from qzoom.checkpoints.format import CONFIG_FILE, detect_kind
from qzoom.checkpoints.lora import LORA_FOLDER
from qzoom.checkpoints.weights import read_index, read_tensors
from qzoom.checkpoints.writing import atomic_folder, copy_side_files
from qzoom.errors import CheckpointError, ConfigError, reason_of
from qzoom.settings import settings
from qzoom.training.student.attention import use_plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH_PX = 16
TOKEN_PX = 32
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "mlp.linear_fc2.weight")


@settings
class TinyArchitecture:
    """Sizes of the model; the vision side feeds DeepStack once, after `vision_deepstack` of its blocks."""

    vision_width: int = 160
    vision_depth: int = 4
    vision_heads: int = 4
    vision_mlp: int = 480
    vision_deepstack: int = 1
    vision_positions: int = 256
    text_width: int = 192
    text_depth: int = 6
    text_heads: int = 6
    text_kv_heads: int = 3
    text_head_dim: int = 32
    text_mlp: int = 512
    rope_theta: float = 1000.0


def tiny_config(arch: TinyArchitecture, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """The stock configuration for these sizes and this tokenizer."""
    from transformers import Qwen3VLConfig

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    third = arch.text_head_dim // 2 // 3
    sections = [arch.text_head_dim // 2 - 2 * third, third, third]
    config = Qwen3VLConfig(
        vision_config={
            "depth": arch.vision_depth,
            "hidden_size": arch.vision_width,
            "intermediate_size": arch.vision_mlp,
            "num_heads": arch.vision_heads,
            "patch_size": PATCH_PX,
            "spatial_merge_size": TOKEN_PX // PATCH_PX,
            "temporal_patch_size": 2,
            "out_hidden_size": arch.text_width,
            "num_position_embeddings": arch.vision_positions,
            "deepstack_visual_indexes": [arch.vision_deepstack],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": arch.text_width,
            "intermediate_size": arch.text_mlp,
            "num_hidden_layers": arch.text_depth,
            "num_attention_heads": arch.text_heads,
            "num_key_value_heads": arch.text_kv_heads,
            "head_dim": arch.text_head_dim,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": arch.rope_theta,
                "mrope_section": sections,
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    return config


def build_tiny(
    arch: TinyArchitecture, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3VLForConditionalGeneration:
    """The model with its first weights, float32, drawn from `seed` alone."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(arch, tokenizer))
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                _draw(name, weight)
            model.model.language_model.norm.weight.fill_(0.5)
    model.generation_config.eos_token_id = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    model.generation_config.pad_token_id = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    model.generation_config.do_sample = False
    return model


def _draw(name: str, weight: object) -> None:
    """Fill one weight: fan-in scaling, small residual outputs, wide position and token tables."""
    assert isinstance(weight, torch.nn.Parameter)
    if "pos_embed" in name:
        weight.normal_(0.0, 0.5)
    elif "embed_tokens" in name:
        weight.normal_(0.0, 0.3)
    elif weight.ndim >= 2:
        std = 1.0 / math.sqrt(weight[0].numel())
        if name.endswith(_RESIDUAL_OUTPUTS):
            std *= 0.3
        weight.normal_(0.0, std)
    elif name.endswith("bias"):
        weight.zero_()


class _RootMeanSquareNorm(torch.autograd.Function):
    """The decoder's norm with a backward pass of five products: the stock one, in many small steps, costs three times
    as much. x (..., width), weight (width,)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x / rms(x) * weight."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(size * size / x.shape[-1] + epsilon).to(x.dtype)
        normed = x * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Gradients of x and weight."""
        normed, weight, inverse = ctx.saved_tensors
        weight_grad = (grad * normed).flatten(0, -2).sum(0)
        scaled = grad * weight
        along = (scaled * normed).mean(-1, keepdim=True)
        return torch.addcmul(scaled, normed, along, value=-1) * inverse, weight_grad, None


def use_fast_kernels(model: Qwen3VLForConditionalGeneration) -> None:
    """Plain attention, a norm with a short backward pass, and the patch embedding as one matrix product on patches of a
    single frame (`patchify`): the stock one sees every picture twice, so the two halves of its weights are added."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return _RootMeanSquareNorm.apply(hidden, self.weight, self.variance_epsilon)

    def embed(self: Any, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight  # (width, 3, 2 frames, 16, 16)
        flat = weight.sum(2).flatten(1)
        return F.linear(patches.to(flat.dtype), flat, self.proj.bias)

    use_plain_attention(model)
    for module in model.modules():
        if isinstance(module, Qwen3VLTextRMSNorm):
            module.forward = types.MethodType(norm, module)
    embedding = model.model.visual.patch_embed
    embedding.forward = types.MethodType(embed, embedding)


def export_model(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the model to `folder` (bf16 safetensors) once it is complete, in place of an earlier one there. `weights`
    stand in for the model's own.

    Raises:
        CheckpointError: the folder holds something else or cannot be written; an earlier model is left then.
    """
    from safetensors.torch import save_file

    stored = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in (weights or model.state_dict()).items()
        if name != "lm_head.weight"
    }
    config = copy.deepcopy(model.config)
    pieces: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for piece in pieces:
        piece._attn_implementation = None
        piece.dtype = torch.bfloat16
    with atomic_folder(folder, "plain") as part:
        _save_tokenizer(tokenizer, part)
        save_file(stored, part / "model.safetensors", metadata={"format": "pt"})
        (part / "model.safetensors").chmod(0o644)
        config.save_pretrained(part)
        model.generation_config.save_pretrained(part)
        (part / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write its files (OSError: the disk refuses, for which the tokenizers library has no exception of its own)."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise OSError(reason_of(error)) from error


def load_weights(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Give `model` the weights that `export_model` wrote to `folder`.

    Raises:
        ConfigError: there are none, or they have other sizes or names.
        CheckpointError: they are damaged.
    """
    if not (folder / "model.safetensors").is_file():
        raise ConfigError(f"start_from: {folder} holds no model.safetensors; give the folder of an exported model.")
    index = read_index(folder)
    weights = {name: weight.to(torch.float32) for name, weight in read_tensors(index, index.tensors).items()}
    own = {name: weight.shape for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    if {name: weight.shape for name, weight in weights.items()} != own:
        raise ConfigError(
            f"start_from: the weights in {folder} belong to another architecture or vocabulary than the recipe's."
        )
    model.load_state_dict(weights, strict=False)


def average_models(folders: Sequence[Path], output: Path) -> None:
    """Write the mean of models that were trained from the same start with different pictures to `output`.

    Args:
        folders: two or more model folders with the same tensors; each counts alike. Means are taken in float32 and
            stored in the first model's number formats, with its settings and tokenizer. Of adapters the branches are
            averaged, and the base model where it lies beside them; the mean refers to the first one's base.
        output: new or empty folder, or an earlier one of the same kind.

    Raises:
        CheckpointError: fewer than two folders, a folder that cannot be read, other names or shapes of tensors, or
            adapters with LoRA weights.
    """
    from safetensors.torch import save_file

    if len(folders) < 2:
        raise CheckpointError("A mean needs at least two model folders.")
    first, kind = folders[0], detect_kind(folders[0]) or "plain"
    for folder in folders:
        if (folder / LORA_FOLDER).exists():
            raise CheckpointError(f"{folder} has LoRA weights; merge them into its base with `qzoom convert` first.")
    branches = ["qzoom"] if kind == "adapter" else []
    base = ["model"] if not branches or any(first.glob("model*.safetensors")) else []
    means = {stem: _mean_of(folders, stem) for stem in base + branches}
    with atomic_folder(output, kind) as part:
        for stem, mean in means.items():
            save_file(mean, part / f"{stem}.safetensors", metadata={"format": "pt"})
            (part / f"{stem}.safetensors").chmod(0o644)
        for name in ["config.json"] * bool(base) + [CONFIG_FILE] * bool(branches):
            shutil.copyfile(first / name, part / name)
        copy_side_files(first, part)


def _mean_of(folders: Sequence[Path], stem: str) -> dict[str, torch.Tensor]:
    """The mean of `STEM.safetensors` of all folders."""
    indexes = [read_index(folder, stem) for folder in folders]
    shapes = [{name: info.shape for name, info in index.tensors.items()} for index in indexes]
    for folder, other in zip(folders[1:], shapes[1:], strict=True):
        different = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if different:
            raise CheckpointError(
                f"{folder} is of another architecture than {folders[0]}: tensor {different[0]} differs; give models "
                "trained from the same start."
            )
    mean = {}
    for name in shapes[0]:
        parts = [read_tensors(index, [name])[name] for index in indexes]
        total = torch.stack([part.to(torch.float32) for part in parts]).mean(dim=0)
        mean[name] = total.to(parts[0].dtype).contiguous()
    return mean


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
