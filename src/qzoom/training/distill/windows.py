"""Parts of a picture instead of the whole, at any sharpness between the whole view's and the crop's.

A crop shows little and shows it sharply, the whole view shows everything small. A student that is only shown the whole
has to learn to search and to read small print at once. A window holds a question's region and some of what surrounds
it, so there is less to search; it costs a fraction of the whole view, and no picture looks the same twice. An option of
ours; the authors (arXiv 2602.11858) train on whole pictures only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from qzoom.config import from_mapping
from qzoom.distill.overlay import Fade
from qzoom.errors import ConfigError
from qzoom.images.geometry import contains
from qzoom.training.distill.data import Question
from qzoom.types import Box

__all__ = ["Windows", "questions_inside", "regions_of", "shifted", "window_around"]

_ASPECTS = (0.6, 1.7)
_ROOM = 1.1


@dataclass(frozen=True, slots=True)
class Windows:
    """When and how windows are shown.

    Args:
        share: of the steps whose pictures are windows, as training goes on.
        tokens: most visual tokens of a window, one drawn per step.
        scale: sharpest view, in pixels of the view per pixel of the picture, at most 1; the least sharp is the whole
            view's.

    Raises:
        ConfigError: a value out of range.
    """

    share: Fade = field(default_factory=lambda: Fade(0.0, 0.0, "constant"))
    tokens: tuple[int, ...] = (144,)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.share, dict):
            object.__setattr__(self, "share", from_mapping(Fade, self.share, "windows: share"))
        if not isinstance(self.share, Fade):
            raise ConfigError(f"windows: share must be a mapping of settings, not {self.share!r}.")
        whole = isinstance(self.tokens, list | tuple) and all(type(value) is int and value > 0 for value in self.tokens)
        if not whole or not self.tokens:
            raise ConfigError(f"windows: tokens must be a list of whole numbers above 0, not {self.tokens!r}.")
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 < self.scale <= 1:
            raise ConfigError(f"windows: scale must be a number above 0 and up to 1, not {self.scale!r}.")

    def draw(self, progress: float, seed: str) -> int:
        """Visual tokens of a step's windows; 0 where it shows whole pictures.

        Args:
            progress: share of the training that is done.
            seed: decides.
        """
        rng = random.Random(seed)
        return rng.choice(self.tokens) if rng.random() < self.share.share(progress) else 0


def window_around(
    target: Box, size_px: tuple[int, int], area_px: int, whole_scale: float, windows: Windows, rng: random.Random
) -> Box:
    """A part of the picture that holds a box.

    Args:
        target: to be held, original pixels.
        size_px: (width, height) of the picture.
        area_px: of the window's view, in its own pixels.
        whole_scale: pixels of the whole view per pixel of the picture.
        windows: how sharp at most.
        rng: draws sharpness, shape and place.

    Returns:
        Original pixels; the whole picture where the window would be as large.
    """
    least = min(whole_scale, windows.scale)
    scale = math.exp(rng.uniform(math.log(least), math.log(windows.scale)))
    area = area_px / scale**2
    aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
    sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
    out = []
    for axis in (0, 1):
        low, high, full = target[axis], target[axis + 2], size_px[axis]
        side = min(full, max(round(sides[axis]), math.ceil(_ROOM * (high - low))))
        first, last = max(0, high - side), min(low, full - side)
        start = rng.randint(min(first, last), max(first, last))
        out.append((start, start + side))
    (x0, x1), (y0, y1) = out
    return x0, y0, x1, y1


def regions_of(questions: Sequence[Question]) -> list[Box]:
    """Regions that a window can be put around: of questions about what is there."""
    return [q.box for q in questions if q.box is not None and not q.negative]


def questions_inside(questions: Sequence[Question], window: Box, seed: int) -> list[Question]:
    """Those that the window can be asked: their region lies in it, or what they ask for is nowhere in the picture.

    Of the latter the same share is kept as of the former, so that windows ask no more often for what is not there.

    Args:
        questions: about one picture, at least one of them with a region.
        window: original pixels.
        seed: decides which are kept.
    """
    regions, rng = regions_of(questions), random.Random(seed)
    share = sum(contains(window, box) for box in regions) / len(regions)
    return [
        q for q in questions if (rng.random() < share if q.negative else q.box is not None and contains(window, q.box))
    ]


def shifted(box: Box | None, window: Box) -> Box | None:
    """A box of the picture in pixels of the window; None where it is not wholly inside."""
    if box is None or not contains(window, box):
        return None
    return box[0] - window[0], box[1] - window[1], box[2] - window[0], box[3] - window[1]
