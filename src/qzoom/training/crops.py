"""Random crops around printed answers, as an imperfect region branch would propose them."""

from __future__ import annotations

import math

import numpy as np

from qzoom.data.synthetic.page import SyntheticQuestion
from qzoom.training.patches import fit_to_tokens

__all__ = ["Box", "crop_around", "inside", "region_tokens", "snippet_box"]

Box = tuple[float, float, float, float]


def inside(question: SyntheticQuestion, box: Box) -> bool:
    """Whether some place that holds the answer lies inside the box (two pixels of slack)."""
    return any(
        b[0] >= box[0] - 2 and b[1] >= box[1] - 2 and b[2] <= box[2] + 2 and b[3] <= box[3] + 2 for b in question.boxes
    )


def crop_around(
    target: tuple[int, int, int, int], size_wh: tuple[int, int], rng: np.random.Generator, cell_px: float
) -> Box:
    """A region box around `target` in a picture of `size_wh`: margins from none to several coarse cells of `cell_px`,
    now and then up to a quarter of the page, now and then cutting into the target."""
    width, height = size_wh
    kind = rng.random()
    if kind < 0.75:
        margins = rng.uniform(0.0, 2.2, 4) * cell_px
    elif kind < 0.93:
        margins = rng.uniform(0.0, 0.25, 4) * np.array([width, height, width, height])
    else:
        margins = rng.uniform(-0.5, 1.0, 4) * cell_px
    box = (target[0] - margins[0], target[1] - margins[1], target[2] + margins[2], target[3] + margins[3])
    if rng.random() < 0.7:
        box = tuple((math.floor if i < 2 else math.ceil)(edge / cell_px) * cell_px for i, edge in enumerate(box))
    x0, y0, x1, y1 = max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])
    least = max(28.0, cell_px)
    if x1 - x0 < least:
        x0 = min(max(0.0, (x0 + x1 - least) / 2), width - least)
        x1 = x0 + least
    if y1 - y0 < least:
        y0 = min(max(0.0, (y0 + y1 - least) / 2), height - least)
        y1 = y0 + least
    return (float(round(x0)), float(round(y0)), float(round(x1)), float(round(y1)))


def region_tokens(box: Box, rng: np.random.Generator, max_tokens: int = 144) -> tuple[int, int]:
    """Tokens (w, h) of a region crop: enlarged to 32 to 80 tokens when small, never above `max_tokens`."""
    least = int(rng.integers(32, 81))
    return fit_to_tokens(round(box[2] - box[0]), round(box[3] - box[1]), max_tokens, min(least, max_tokens))


def snippet_box(
    target: tuple[int, int, int, int],
    size_wh: tuple[int, int],
    text_px: float,
    tokens_wh: tuple[int, int],
    rng: np.random.Generator,
) -> Box:
    """A box that shows `target` at `tokens_wh` tokens with its text `text_px` high, the target anywhere inside it (the
    box may be enlarged so that the target fits, and is kept inside the picture)."""
    width, height = size_wh
    scale = text_px / max(1.0, target[3] - target[1])
    wide = max(tokens_wh[0] * 32 / scale, (target[2] - target[0]) * 1.05 + 4)
    high = max(tokens_wh[1] * 32 / scale, (target[3] - target[1]) * 1.1 + 4)
    grow = max(wide * scale / (tokens_wh[0] * 32), high * scale / (tokens_wh[1] * 32))
    wide, high = tokens_wh[0] * 32 / scale * grow, tokens_wh[1] * 32 / scale * grow
    shrink = min(1.0, width / wide, height / high)
    wide, high = wide * shrink, high * shrink
    x0 = _between(target[2] - wide, min(float(target[0]), width - wide), rng)
    y0 = _between(target[3] - high, min(float(target[1]), height - high), rng)
    x0, y0 = max(0.0, min(x0, width - wide)), max(0.0, min(y0, height - high))
    return (x0, y0, min(x0 + wide, float(width)), min(y0 + high, float(height)))


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """A number between `low` (at least 0) and `high`; where the range is empty, its lower end."""
    low = max(0.0, low)
    return float(low + rng.random() * max(0.0, high - low))
