"""Choose the layer and the head that look at the place on one half of the pictures, and report on the other. Pure.

The best of many heads always looks good on the questions that chose it; only the other half says how good it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qzoom.errors import DataError
from qzoom.evaluation.intervals import bootstrap, interval_of

__all__ = ["Chosen", "choose", "choosing_half", "depth"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A layer, or a head of one, with its figures on the half that did not choose it.

    Args:
        layer: index from 0.
        head: index from 0; None for the mean over the layer's heads.
        depth: share of the model's layers up to and with this one.
        lift: mean share of attention over share of area; 1 is chance.
        lift_interval: its 95 % interval, drawn by picture.
        hit: share of questions whose highest cell touches the place.
        hit_interval: its 95 % interval.
        lift_when_chosen: on the half that chose it, for comparison.
    """

    layer: int
    head: int | None
    depth: float
    lift: float
    lift_interval: tuple[float, float]
    hit: float
    hit_interval: tuple[float, float]
    lift_when_chosen: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def choosing_half(pictures: Sequence[str]) -> np.ndarray:
    """Which questions choose, (questions,) bool: those of every other picture in an order that only the ids decide.

    Raises:
        DataError: fewer than two pictures.
    """
    names = sorted(set(pictures), key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    if len(names) < 2:
        raise DataError("Choosing a layer on one half of the pictures needs two pictures with places or more.")
    chosen = set(names[::2])
    return np.array([name in chosen for name in pictures])


def choose(values: np.ndarray, pictures: Sequence[str], *, of_heads: bool, seed: int = 0) -> Chosen:
    """The place with the highest mean lift on the choosing half.

    Args:
        values: (questions, 2 figures, layers, heads + 1) of one measure, see `statistics.scores`.
        pictures: of each question.
        of_heads: choose among single heads instead of means over a layer's heads.
        seed: of the draws behind the intervals.

    Raises:
        DataError: fewer than two pictures.
    """
    choosing = choosing_half(pictures)
    candidates = values[..., :-1] if of_heads else values[..., -1:]
    means = candidates[choosing, 0].mean(0)
    layer, head = (int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    kept = candidates[~choosing][:, :, layer, head]
    names = [name for name, left_out in zip(pictures, ~choosing, strict=True) if left_out]
    drawn = bootstrap(kept.T, names, seed)
    return Chosen(
        layer=layer,
        head=head if of_heads else None,
        depth=depth(layer, values.shape[2]),
        lift=float(kept[:, 0].mean()),
        lift_interval=interval_of(drawn[0]),
        hit=float(kept[:, 1].mean()),
        hit_interval=interval_of(drawn[1]),
        lift_when_chosen=float(means[layer, head]),
    )


def depth(layer: int, layers: int) -> float:
    """Share of the layers up to and with this one."""
    return (layer + 1) / layers
