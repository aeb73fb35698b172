"""Patch embeddings as linear maps.

The Qwen and GLM vision encoders embed each patch by a 3D convolution whose kernel covers it exactly, which is a matrix
product. As such it takes a third of the time on CPUs; some versions of cuDNN have no fast kernel for the convolution.
transformers offers the same exchange as `fusion_config`, but for all models of a class in the process.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional


def use_linear_patches(tower: nn.Module) -> None:
    """Compute a vision encoder's patch embedding as a linear map, if it is one. Weights and their names stay."""
    conv = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if isinstance(conv, nn.Conv3d) and conv.stride == conv.kernel_size and not any(conv.padding) and conv.groups == 1:
        conv.forward = partial(_linear, conv)  # type: ignore[method-assign]


def _linear(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """(n, channels, frames, rows, columns), each as large as the kernel -> (n, hidden, 1, 1, 1)."""
    out = functional.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)
    return out[:, :, None, None, None]
