"""What a map of attention says about a place: relative maps, lift, pointing. Pure; the last two axes are the grid.

The relative map divides the question's map by that of a request which asks for nothing in particular, so that sinks and
favourite places of a head fall out (after the relative attention of arXiv 2502.17422).
"""

from __future__ import annotations

import numpy as np

__all__ = ["EPSILON", "MEASURES", "lift", "pointing", "relative", "release_ratio", "scores"]

EPSILON = 0.001
"""Added to the generic map before dividing, as a share of its mean, so that cells without attention do not explode."""

MEASURES = ("relative", "raw")
"""Maps that are scored: the question's over the generic one's, and the question's own."""


def relative(question: np.ndarray, generic: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """The question's map over the generic one.

    Args:
        question: (..., rows, columns), not negative.
        generic: the same shape.
        epsilon: see `EPSILON`.
    """
    guard = epsilon * generic.mean((-2, -1), keepdims=True)
    return question / np.maximum(generic + guard, np.finfo(np.float64).tiny)


def lift(values: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Share of a map inside the place over the place's share of the picture; 1 is chance.

    Args:
        values: (..., rows, columns), not negative.
        covered: (rows, columns) from 0 to 1, see `covered_cells`; something must be covered.

    Returns:
        (...,); 0 for a map without attention.
    """
    total = values.sum((-2, -1))
    inside = (values * covered).sum((-2, -1))
    share = np.divide(inside, total, out=np.zeros_like(total), where=total > 0)
    return share / covered.mean()


def pointing(values: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Whether the highest cell (of equal ones the first in reading order) touches the place, 0 or 1.

    Args and returns: as in `lift`.
    """
    flat = values.reshape(*values.shape[:-2], -1)
    return (covered.reshape(-1)[flat.argmax(-1)] > 0).astype(np.float64)


def release_ratio(question: np.ndarray, cells: np.ndarray) -> float:
    """Share of one map (rows, columns) in the cells that the release counts, see `inclusive_cells`."""
    total = float(question.sum())
    return float(question[cells].sum()) / total if total > 0 else 0.0


def scores(question: np.ndarray, generic: np.ndarray, covered: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """Lift and pointing of every head and of the mean over the heads, for both measures.

    Args:
        question: (layers, heads, rows, columns).
        generic: the same.
        covered: (rows, columns).
        epsilon: see `EPSILON`.

    Returns:
        (2 measures, 2 figures, layers, heads + 1) in the order of `MEASURES`, lift before pointing; the last "head" is
        the mean.
    """
    maps = [np.concatenate([m, m.mean(1, keepdims=True)], axis=1).astype(np.float64) for m in (question, generic)]
    both = [relative(maps[0], maps[1], epsilon), maps[0]]
    return np.stack([np.stack([lift(m, covered), pointing(m, covered)]) for m in both])
