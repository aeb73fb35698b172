"""Bases in 4 or 8 bit: what is quantised, and plain weights out of a quantised layer.

Only linear maps of the decoder's layers are held in few bits; encoder, tables, norms and both branches stay in the
loaded number format. Any library that transformers knows may do it; bitsandbytes does what "4bit" and "8bit" ask for.
"""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from qzoom.backbones.base import Backbone

WORDS = ("4bit", "8bit")


def quantization_config(quantization: Any, dtype: torch.dtype, keep: tuple[str, ...]) -> Any:
    """transformers' quantisation config.

    Args:
        quantization: "4bit" (NF4, its scales quantised too), "8bit" (LLM.int8), or a config of transformers, which is
            returned as it is.
        dtype: what products are computed in.
        keep: names of modules that stay as they are.

    Raises:
        ConfigError: another word, or bitsandbytes is not installed.
    """
    if not isinstance(quantization, str) and hasattr(quantization, "quant_method"):
        return quantization
    if quantization not in WORDS:
        raise ConfigError(
            f"quantization must be '4bit', '8bit' or a quantization config of transformers, not {quantization!r}."
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={quantization!r} needs the package bitsandbytes; install it with: pip install "
            "'qzoom[quantized]'."
        )
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning per product in 8 bit
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(keep),
    )


def is_quantized_map(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is not a plain matrix."""
    weight = getattr(module, "weight", None)
    if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return False
    return type(module) is not nn.Linear or type(weight) is not nn.Parameter


def settle(model: nn.Module, *, training: bool = False) -> None:
    """Keep bitsandbytes from repacking 4-bit maps, at first use on a CPU, that its fast format cannot hold. `model`:
    its quantised maps are looked at. `training`: repack none, since gradients do not pass through that format."""
    for module in model.modules():
        odd = is_quantized_map(module) and (module.in_features % 64 or module.out_features % 32)  # type: ignore[operator]
        if (odd or training) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(backbone: Backbone) -> bool:
    """Whether the decoder's linear maps are held in few bits."""
    return any(is_quantized_map(module) for module in backbone.layers.modules())


def plain_copy(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a decoder layer whose linear maps are plain matrices in a number format."""
    if not any(is_quantized_map(module) for module in layer.modules()):
        return copy.deepcopy(layer)
    maps = [(name, module) for name, module in layer.named_modules() if is_quantized_map(module)]
    memo: dict[int, Any] = {id(module): nn.Identity() for _, module in maps}
    out = copy.deepcopy(layer, memo)
    for name, module in maps:
        weight, bias = plain_weight(module, dtype), getattr(module, "bias", None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(out.get_submodule(parent), child, plain)
    return out


@torch.no_grad()
def plain_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in) of a quantised linear map, read off what it makes of the unit vectors.

    This asks nothing of the library that holds it. Products of unit vectors are exact in the map's own number format,
    once the bias is away: beside a large one, small weights would be rounded off.
    """
    device, parts, bias = next(module.parameters()).device, [], getattr(module, "bias", None)
    module.bias = None
    try:
        for start in range(0, module.in_features, 1024):
            rows = min(1024, module.in_features - start)
            unit = torch.zeros(rows, module.in_features, dtype=dtype, device=device)
            unit[torch.arange(rows), torch.arange(start, start + rows)] = 1
            parts.append(module(unit))
    finally:
        module.bias = bias
    return torch.cat(parts).T.contiguous().to(dtype)


def add_beside(module: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
    """Let a quantised linear map add a product of two small matrices to what it gives: W x + scale * up (down x)."""

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        small = torch.nn.functional.linear(args[0], down.to(args[0].dtype))
        return output + torch.nn.functional.linear(small, up.to(args[0].dtype)).to(output.dtype) * scale

    module.register_forward_hook(add)
