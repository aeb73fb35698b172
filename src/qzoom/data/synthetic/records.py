"""Records of the synthetic pictures: a picture, its printed lines, and questions with answers and boxes.

They are what every renderer returns and what training, labelling and evaluation read. Coordinates are original
pixels of the picture in the same record, xyxy, half-open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = [
    "HELD_OUT_SEEDS",
    "TRAIN_SEEDS",
    "SceneObject",
    "SyntheticQuestion",
    "SyntheticSample",
    "TextLine",
    "TextSpan",
]

TRAIN_SEEDS = range(0, 2**31)
"""Seeds that training may draw from."""

HELD_OUT_SEEDS = range(2**31, 2**31 + 1_000_000)
"""Seeds of pictures that no training run may see; evaluation draws from these."""


@dataclass(frozen=True, slots=True, eq=False)
class TextLine:
    """One printed run of text.

    `char_boxes_px` has shape (len(text), 4), float32: the cell of every character, as wide as its advance and as high
    as the line's ink.
    """

    text: str
    char_boxes_px: np.ndarray

    @property
    def height_px(self) -> float:
        """Height of the line's ink in pixels (0 for an empty line)."""
        if not self.text:
            return 0.0
        return float((self.char_boxes_px[:, 3] - self.char_boxes_px[:, 1]).mean())


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Characters `start` to `stop` (half-open) of line number `line` of a sample."""

    line: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SyntheticQuestion:
    """A question about a synthetic picture.

    `boxes` are all places that hold the answer; `spans` the printed characters that spell it, in order, when the
    answer is printed as it stands (empty otherwise). `easy`: the coarse look should be enough.
    """

    field: str
    question: str
    answer: str
    boxes: tuple[tuple[int, int, int, int], ...]
    easy: bool
    spans: tuple[TextSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class SceneObject:
    """A drawn object: names of its colour and shape, and its box (xyxy, pixels), its tag included."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticSample:
    """A rendered picture (RGB) with its printed lines and its questions; `kind` names the renderer's variety. `objects`
    are a scene's objects."""

    image: Image.Image
    questions: tuple[SyntheticQuestion, ...]
    kind: str
    seed: int
    lines: tuple[TextLine, ...] = ()
    objects: tuple[SceneObject, ...] = ()
