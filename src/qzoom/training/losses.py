"""The three losses as pure functions: region map, gate, answer (docs/method.md 5.4, 2 and 6).

All share one rule: labels of -100 are left out, and a batch in which everything is left out costs 0 with a graph, so
that a distributed step neither stops nor turns into NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from qzoom.labels.maps import IGNORE

_ALPHA, _GAMMA = 0.9, 2.0


def region_loss(logits: Sequence[Tensor], targets: Sequence[Tensor], *, focal: bool = False) -> Tensor:
    """Binary cross entropy on the raw mean-head logits (a scalar), one plain mean over the valid cells of the batch.

    Args:
        logits: one (rows, columns) map per question, before the sigmoid; sizes may differ.
        targets: one (rows', columns') map per question: 1, 0 or -100. Logits of another size are resized bilinearly
            to the target's, corners not aligned.
        focal: weigh every cell by how wrong it is (alpha 0.9, gamma 2; arXiv 1708.02002).

    Raises:
        ValueError: not one target per map, or no map at all.
    """
    if not logits:
        raise ValueError("The region loss needs at least one map.")
    flat = torch.cat(
        [_resized(values.float(), target.shape).flatten() for values, target in zip(logits, targets, strict=True)]
    )
    labels = torch.cat([target.flatten() for target in targets])
    return _masked_bce(flat, labels, focal=focal)


def gate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of the gate (a scalar), mean over the samples that have a label. `targets`: as many labels:
    1 zoom, 0 coarse is enough, -100 ignored."""
    return _masked_bce(logits.float().flatten(), targets.flatten())


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross entropy (a scalar), mean over the labelled tokens.

    Args:
        logits: (..., length, vocabulary) over the whole sequence, inserted region blocks included.
        labels: (..., length) token ids, -100 where nothing is to be learnt.
    """
    predicted = logits[..., :-1, :].float().flatten(0, -2)
    wanted = labels[..., 1:].flatten()
    valid = wanted != IGNORE
    if not bool(valid.any()):
        return predicted[valid].sum()
    return cross_entropy(predicted[valid], wanted[valid])


def _resized(values: Tensor, size: torch.Size) -> Tensor:
    if values.shape == size:
        return values
    return interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _masked_bce(logits: Tensor, targets: Tensor, *, focal: bool = False) -> Tensor:
    valid = targets != IGNORE
    if not bool(valid.any()):
        return logits[valid].sum()
    logits, wanted = logits[valid], targets[valid].to(logits.dtype)
    if not focal:
        return binary_cross_entropy_with_logits(logits, wanted)
    entropy = binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = torch.where(wanted == 1, logits.sigmoid(), 1 - logits.sigmoid())
    weight = torch.where(wanted == 1, _ALPHA, 1 - _ALPHA)
    return (weight * (1 - right) ** _GAMMA * entropy).mean()
