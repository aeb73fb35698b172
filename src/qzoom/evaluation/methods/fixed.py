"""Fixed boxes: the centre, a random box, and the annotated box of the answer (the oracle).

Centre and random box show the gain of any second view, the oracle the gain of the best possible box.
"""

from __future__ import annotations

import functools
import hashlib
import random
from typing import Any, Literal

from qzoom.data.samples import SampleQuestion
from qzoom.engine.request import Options
from qzoom.evaluation.methods.base import Answered, Method, box_on, start
from qzoom.images.geometry import box_area_px
from qzoom.model import QZoom
from qzoom.types import Box, GateDecision

SIDE = 0.4
"""Share of each side of the picture that the centre and the random box take."""


def read_fixed_box(
    model: QZoom,
    images: Any,
    question: SampleQuestion,
    options: Options,
    *,
    place: Literal["centre", "random", "oracle"],
    seed: int = 0,
    margin_cells: float = 0.5,
) -> Answered:
    """Always read one box; see `Method.answer`. Without a known place the oracle answers from the coarse pass.

    Args:
        seed: of the random places, together with the question and the picture's size.
        margin_cells: coarse cells around the oracle's box; the least that a checkpoint's own boxes have is kept.
    """
    reading = start(model, images, question, options)
    if place == "centre":
        return reading.answer_zoomed([box_on(reading, centre_box(reading.size_px))])
    if place == "random":
        return reading.answer_zoomed([box_on(reading, random_box(reading.size_px, question.question, seed))])
    if not question.boxes:
        return reading.answer_coarse(GateDecision(None, None, False, "The place of the answer is not known."))
    smallest = min(question.boxes, key=lambda box: (box_area_px(box), box))
    margin = max(margin_cells, model.config.box.margin_cells)
    return reading.answer_zoomed([box_on(reading, smallest, margin)])


def centre_box(size_px: tuple[int, int], side: float = SIDE) -> Box:
    """The middle of a picture."""
    return _placed(size_px, side, 0.5, 0.5)


def random_box(size_px: tuple[int, int], text: str, seed: int = 0, side: float = SIDE) -> Box:
    """A place drawn evenly; the same for the same question, picture size and seed, in every process."""
    digest = hashlib.sha256(f"{seed}|{size_px[0]}x{size_px[1]}|{text}".encode()).digest()
    drawn = random.Random(digest)
    return _placed(size_px, side, drawn.random(), drawn.random())


def _placed(size_px: tuple[int, int], side: float, across: float, down: float) -> Box:
    """A box of this share of each side; 0 is the left or upper end, 1 the right or lower one."""
    width, height = (max(1, round(length * side)) for length in size_px)
    x, y = round((size_px[0] - width) * across), round((size_px[1] - height) * down)
    return x, y, x + width, y + height


CENTRE = Method("centre", functools.partial(read_fixed_box, place="centre"))
RANDOM = Method("random", functools.partial(read_fixed_box, place="random"), draws=True)
ORACLE = Method("oracle", functools.partial(read_fixed_box, place="oracle"))
