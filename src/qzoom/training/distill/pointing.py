"""Region as privileged information, shown to the attention instead of the eye: chosen heads learn to look at it.

While the answer is written, the share of a head's attention that falls on the region's visual tokens is raised by its
negative logarithm. The picture stays unmarked, so training and use see the same one. An option of ours; the authors
(arXiv 2602.11858) draw the region only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qzoom.errors import ConfigError
from qzoom.training.attention import attention_logits
from qzoom.training.distill.collate import IGNORE
from qzoom.training.distill.recipe import PointingPart

__all__ = ["check_pointing", "pointing_loss", "watched_layer"]


def check_pointing(model: Any, part: PointingPart) -> None:
    """Refuse a layer, heads or a family that cannot point.

    Raises:
        ConfigError: it says which.
    """
    if not part.weight:
        return
    if model.config.model_type != "qwen3_vl":
        raise ConfigError(f"pointing works for Qwen3-VL students, not {model.config.model_type}; set its weight to 0.")
    text = model.config.text_config
    if part.layer >= text.num_hidden_layers:
        raise ConfigError(f"pointing: layer {part.layer} is outside the student's {text.num_hidden_layers} layers.")
    if max(part.heads) >= text.num_attention_heads:
        raise ConfigError(
            f"pointing: head {max(part.heads)} is outside the student's {text.num_attention_heads} heads."
        )


@contextlib.contextmanager
def watched_layer(layer: Any) -> Iterator[dict[str, Any]]:
    """What enters a decoder layer inside the block: "hidden" (B, S, width) and "rotary"."""
    seen: dict[str, Any] = {}

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]
        seen["rotary"] = kwargs["position_embeddings"]

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def pointing_loss(
    layer: Any, seen: Mapping[str, Any], labels: Tensor, given: Mapping[str, Tensor], heads: tuple[int, ...]
) -> Tensor:
    """Negative logarithm of the attention on the region: mean over heads, sum over the places that write an answer.

    Args:
        layer: of the decoder.
        seen: what entered it, see `watched_layer`.
        labels: (B, S), -100 outside the answers.
        given: `regions` (B, questions, S) and `branch` (B, S), see `qzoom.training.distill.collate`.
        heads: that point.

    Returns:
        A scalar, 0 without any region.
    """
    regions, branch = given["regions"], given["branch"]
    writes = torch.zeros_like(labels, dtype=torch.bool)
    writes[:, :-1] = labels[:, 1:] != IGNORE
    rows, places = writes.nonzero(as_tuple=True)
    targets = regions[rows, branch[rows, places].clamp(min=1) - 1]
    known = targets.any(-1)
    if not bool(known.any()):
        return torch.as_tensor(seen["hidden"].sum() * 0.0)
    rows, places, targets = rows[known], places[known], targets[known]
    logits = attention_logits(layer, seen["hidden"], seen["rotary"], rows, places, heads)
    logits = logits.masked_fill(~_may_attend(branch, rows, places)[:, None], float("-inf"))
    on_region = logits.masked_fill(~targets[:, None], float("-inf"))
    return (logits.logsumexp(-1) - on_region.logsumexp(-1)).mean(-1).sum()


def _may_attend(branch: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """(n, S): what came before, of the picture and of the own question."""
    own = branch[rows, places][:, None]
    before = torch.arange(branch.shape[1], device=branch.device)[None] <= places[:, None]
    return ((branch[rows] == 0) | (branch[rows] == own)) & before
