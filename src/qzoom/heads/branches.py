"""The two branches as modules: T decoder layers of the backbone's own class, and for the gate a linear score.

Both read H_K, the hidden states after the shared layers, and start as copies of base layers K..K+T-1
(docs/method.md 2, 3). They hold weights only; the engine runs them, because it owns the caches.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qzoom.backbones.base import Backbone


class GateBranch(nn.Module):
    """Decides whether the coarse view is enough."""

    def __init__(self, layers: nn.ModuleList, hidden_size: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(hidden_size, 1)

    def logit(self, hidden_last: Tensor) -> Tensor:
        """Last-token hidden states (..., hidden) after the layers to logits (...,); no norm in between."""
        return self.head(hidden_last)[..., 0].float()


class RegionBranch(nn.Module):
    """Finds the region: T - 1 whole layers, of the T-th only norm, queries and keys. `layers`: T decoder layers.
    `norm`: of its own, between the whole layers and the T-th; None: the family has none."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.norm = norm

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states after the whole layers as the T-th takes them."""
        return hidden if self.norm is None else self.norm(hidden)


def new_gate(backbone: Backbone, shared_layers: int, branch_layers: int) -> GateBranch:
    """A gate branch initialised from base layers K..K+T-1, with a small random score vector and no bias, so near 0.5
    (ConfigError: K + T exceeds the base's layers, or ends on a layer without queries and keys)."""
    gate = GateBranch(_branch_layers(backbone, shared_layers, branch_layers), backbone.hidden_size)
    nn.init.zeros_(gate.head.bias)
    nn.init.normal_(gate.head.weight, std=backbone.hidden_size**-0.5 * 0.1)
    return gate.to(backbone.device, backbone.dtype)


def new_region(backbone: Backbone, shared_layers: int, branch_layers: int, *, norm: bool = False) -> RegionBranch:
    """A region branch initialised from base layers K..K+T-1; arguments and errors as `new_gate`. `norm`: give it a norm
    of its own, which starts as the base's final one (`ZoomConfig.branch_norm`)."""
    own = copy.deepcopy(backbone.decoder.norm) if norm else None
    return RegionBranch(_branch_layers(backbone, shared_layers, branch_layers), own)  # type: ignore[arg-type]


def _branch_layers(backbone: Backbone, shared_layers: int, branch_layers: int) -> nn.ModuleList:
    backbone.check_depth(shared_layers, branch_layers)
    with torch.no_grad():
        return nn.ModuleList(backbone.new_branch_layer(shared_layers + i) for i in range(branch_layers))
