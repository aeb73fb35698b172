"""The optimiser: Muon for the matrices inside the towers, AdamW for everything else, in one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qzoom.checkpoints.base import bfloat16_is_slow


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all other weights, as one optimiser with one state.

    Muon's update has the size of AdamW's (`match_rms_adamw`), so both share one learning rate and one schedule.
    On a CPU that computes bfloat16 slowly its Newton-Schulz iterations run in float32.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        others: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._parts: tuple[torch.optim.Optimizer, ...] = ()
        if matrices:
            self._parts += (
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            )
        if others:
            self._parts += (torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas),)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all weights."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        with _Float32ForBfloat16() if self._slow_matrices() else contextlib.nullcontext():
            for part in self._parts:
                part.step()
        return loss

    def _slow_matrices(self) -> bool:
        return self.param_groups[0]["params"][0].device.type == "cpu" and bfloat16_is_slow()


class _Float32ForBfloat16(TorchFunctionMode):
    """`Tensor.bfloat16()` gives float32 copies inside; torch's Muon has no setting for its number format."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def split_matrices(weights: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the towers, and all else: tables, norms, biases, convolutions and the guides."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in weights:
        table = "embed" in name or "glyph_head" in name or "object_head" in name or "lm_head" in name
        (matrices if weight.ndim == 2 and not table else others).append(weight)
    return matrices, others
