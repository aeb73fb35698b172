"""Fixed boxes: the centre, a random box, and the annotated box of the answer (the oracle).

Centre and random box show the gain of any second view, the oracle the gain of the best possible box.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qzoom.engine.request import Options
from qzoom.evaluation.methods.base import Method, Reading, box_on, start
from qzoom.images.geometry import box_area_px
from qzoom.types import Answer, Box, GateDecision

if TYPE_CHECKING:
    from qzoom.data.samples import SampleQuestion
    from qzoom.model import QZoom

SIDE = 0.4
"""Share of each side of the picture that the centre and the random box take."""


@dataclass(frozen=True, slots=True)
class FixedBox(Method):
    """Always reads one box; see `Method`.

    Args:
        place: where the box is.
        seed: of the random places, together with the question and the picture's size.
        margin_cells: coarse cells around the oracle's box; the least that a checkpoint's own boxes have is kept.
    """

    place: Literal["centre", "random", "oracle"]
    seed: int = 0
    margin_cells: float = 0.5

    def answer(
        self, model: QZoom, images: Any, question: SampleQuestion, options: Options
    ) -> tuple[Answer, dict[str, float]]:
        """See `Method.answer`; without a known place the oracle answers from the coarse pass and says so."""
        reading = start(model, images, question, options)
        if self.place != "oracle":
            return reading.answer_zoomed([box_on(reading, self._box(reading, question.question))])
        if not question.boxes:
            return reading.answer_coarse(GateDecision(None, None, False, "The place of the answer is not known."))
        smallest = min(question.boxes, key=lambda box: (box_area_px(box), box))
        margin = max(self.margin_cells, model.config.box.margin_cells)
        return reading.answer_zoomed([box_on(reading, smallest, margin)])

    def _box(self, reading: Reading, text: str) -> Box:
        if self.place == "centre":
            return centre_box(reading.size_px)
        return random_box(reading.size_px, text, self.seed)


def centre_box(size_px: tuple[int, int], side: float = SIDE) -> Box:
    """The middle of a picture.

    Args:
        size_px: (width, height).
        side: share of each side.
    """
    return _placed(size_px, side, 0.5, 0.5)


def random_box(size_px: tuple[int, int], text: str, seed: int = 0, side: float = SIDE) -> Box:
    """A place drawn evenly; the same for the same question, picture size and seed, in every process.

    Args:
        size_px: (width, height).
        text: the question.
        seed: chooses another draw.
        side: share of each side.
    """
    digest = hashlib.sha256(f"{seed}|{size_px[0]}x{size_px[1]}|{text}".encode()).digest()
    drawn = random.Random(digest)
    return _placed(size_px, side, drawn.random(), drawn.random())


def _placed(size_px: tuple[int, int], side: float, across: float, down: float) -> Box:
    """A box of this share of each side; 0 is the left or upper end, 1 the right or lower one."""
    width, height = (max(1, round(length * side)) for length in size_px)
    x, y = round((size_px[0] - width) * across), round((size_px[1] - height) * down)
    return x, y, x + width, y + height


CENTRE = FixedBox("centre", "centre")
RANDOM = FixedBox("random", "random")
ORACLE = FixedBox("oracle", "oracle")
