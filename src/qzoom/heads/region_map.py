"""From the region branch's queries and keys to a probability map over the coarse cells (docs/method.md 3).

Pure functions of tensors. The sink rules are the release's: the first token's map for Qwen3-VL, corner cells for
Qwen2.5-VL. Maps of one row or one column, on which the release fails, are blurred along their long side only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qzoom.config import ZoomConfig

CORNER_RULE_CELLS = 256  # maps with more cells than this lose their first quarter row and column


@dataclass(frozen=True, slots=True)
class RegionMap:
    """Every step of one picture's map, each (rows, columns) float32."""

    logits: Tensor  # scaled query-key products, mean over heads
    sink_prob: Tensor | None  # the first token's map after the sigmoid; None when the config has another sink rule
    keep: Tensor  # 1 where a cell may be foreground, 0 for sinks
    masked: Tensor  # sigmoid(logits) * keep
    blurred: Tensor  # masked after the 3x3 blur; boxes are drawn on it


def mean_head_logits(query: Tensor, keys: Tensor, *, joined: bool = False) -> Tensor:
    """Scaled products of one query with every key, mean over query heads.

    Args:
        query: (heads, head_dim), or (1, head_dim) to use one query against the keys of every head.
        keys: (kv_heads, n, head_dim); shared by heads / kv_heads query heads each.
        joined: one product over all heads together instead, not scaled.

    Returns:
        (n,) float32.
    """
    query, keys = query.float(), keys.float()
    groups = query.shape[0] // keys.shape[0]
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=0)
    products = (query[:, None, :] * keys).sum(-1)
    return products.sum(0) if joined else products.mul(keys.shape[-1] ** -0.5).mean(0)


def corner_keep(grid: tuple[int, int]) -> Tensor:
    """Qwen2.5-VL's rule: on large maps the first quarter of the first row and of the first column is dropped. Returns
    (rows, columns) float32 of ones and zeros."""
    rows, columns = grid
    keep = torch.ones(rows, columns)
    if rows * columns > CORNER_RULE_CELLS:
        keep[: max(1, rows // 4), 0] = 0
        keep[0, : max(1, columns // 4)] = 0
    return keep


def blur(prob: Tensor, sigma: float = 1.0) -> Tensor:
    """3x3 Gaussian blur with reflected borders, as nine shifted sums.

    A convolution would be shorter, but on CUDA it may run in TF32, whose rounding moves cells across the threshold.

    Args:
        prob: (rows, columns).
        sigma: standard deviation in cells.
    """
    offsets = torch.arange(-1, 2, dtype=prob.dtype, device=prob.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    kernel = torch.outer(weights, weights)
    out = prob[None, None]
    out = pad(out, (1, 1, 0, 0), mode="reflect" if prob.shape[1] > 1 else "replicate")
    out = pad(out, (0, 0, 1, 1), mode="reflect" if prob.shape[0] > 1 else "replicate")
    rows, columns = prob.shape
    blurred = torch.zeros_like(prob)
    for i in range(3):
        for j in range(3):
            blurred += kernel[i, j] * out[0, 0, i : i + rows, j : j + columns]
    return blurred


def peak_score(maps: Sequence[Tensor]) -> float:
    """How far the highest cell of all maps stands out of their mean: 1 - mean / peak, 0 where no cell has a value.

    Args:
        maps: blurred probabilities (rows, columns), one per picture.
    """
    values = torch.cat([one.flatten() for one in maps])
    peak = float(values.max())
    return 1 - float(values.mean()) / peak if peak > 0 else 0.0


def region_map(logits: Tensor, sink_logits: Tensor | None, grid: tuple[int, int], config: ZoomConfig) -> RegionMap:
    """Sigmoid, sink removal and blur for one picture.

    Args:
        logits: (rows * columns,) mean-head logits of the last prompt token's query.
        sink_logits: the same of the first prompt token's head-0 query; needed for the "first_token" rule.
    """
    plain = logits.float().view(grid)
    sink_prob = None
    keep = torch.ones_like(plain)
    if config.sink == "first_token" and sink_logits is not None:
        sink_prob = sink_logits.float().view(grid).sigmoid()
        keep = (sink_prob < config.sink_threshold).to(plain.dtype)
    elif config.sink == "corner":
        keep = corner_keep(grid).to(plain.device)
    masked = plain.sigmoid() * keep
    return RegionMap(plain, sink_prob, keep, masked, blur(masked))
