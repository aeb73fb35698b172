"""Linear maps of wide float32 models on AMD processors by oneDNN.

torch computes float32 products with MKL, which is 1.2 to 1.4 times slower there at any number of tokens. No weights are
copied and the model's code is as it was: while `OneDnnLinear` is entered, torch hands every linear map to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

LEAST_WEIGHTS = 2**19
"""Smaller maps are no faster by oneDNN."""
LEAST_WIDTH = 512
"""Narrower decoders have only such maps, and asking costs a microsecond or two at every operation."""


class OneDnnLinear(TorchFunctionMode):
    """Within it, this thread's large float32 linear maps on the CPU that need no gradient are oneDNN's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of every function."""
        if func is linear and not kwargs and _is_large(*args) and not torch.is_grad_enabled():
            hidden, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_large(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        weight.numel() >= LEAST_WEIGHTS
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype == hidden.dtype == torch.float32
        and weight.device.type == hidden.device.type == "cpu"
        and hidden.numel() > 0
    )


@cache
def _helps() -> bool:
    """Whether this is an AMD processor and torch has oneDNN."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        amd = False
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fast_linear(device: torch.device, dtype: torch.dtype, width: int) -> AbstractContextManager[Any]:
    """`OneDnnLinear` where a decoder of this width gains by it, else nothing."""
    wide = device.type == "cpu" and dtype == torch.float32 and width >= LEAST_WIDTH
    return OneDnnLinear() if wide and _helps() else nullcontext()
