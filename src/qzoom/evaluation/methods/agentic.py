"""Agentic zoom: the model is asked for a bounding box in text, and the question is asked again with that region.

The first round asks for a box in coordinates from 0 to 1000 on the coarse view. The second round reads the region as
every other method does. If the model gives no box, it answers from the coarse pass, and the failure is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qzoom.data.samples import SampleQuestion
from qzoom.engine.generate import prefill
from qzoom.engine.request import Options
from qzoom.evaluation.methods.base import Answered, Method, box_on, decode_row, start
from qzoom.model import QZoom
from qzoom.types import Box, GateDecision

REQUEST = (
    "{question}\nFirst say where to look: write the box of the region that holds the answer as [x0, y0, x1, y1], "
    "in whole numbers from 0 to 1000 across and down the picture, and nothing else."
)
SCALE = 1000
_FOUR = re.compile(r"(\d+(?:\.\d+)?)[\s,;]+" * 3 + r"(\d+(?:\.\d+)?)")


def read_box(text: str, size_px: tuple[int, int]) -> Box | None:
    """The first four numbers of a text as a box.

    Args:
        text: what the model said; numbers are thousandths of the picture's sides.
        size_px: (width, height).

    Returns:
        xyxy in original pixels, half-open; None when there are no four numbers in a row, one is above 1000, or they
        hold no area.
    """
    match = _FOUR.search(text)
    if match is None:
        return None
    x0, y0, x1, y1 = (float(number) for number in match.groups())
    if max(x0, y0, x1, y1) > SCALE or x0 >= x1 or y0 >= y1:
        return None
    width, height = size_px
    left, top = int(x0 * width / SCALE), int(y0 * height / SCALE)
    return left, top, max(left + 1, int(-(-x1 * width // SCALE))), max(top + 1, int(-(-y1 * height // SCALE)))


def ask_for_box(
    model: QZoom,
    images: Any,
    question: SampleQuestion,
    options: Options,
    *,
    request: str = REQUEST,
    max_box_tokens: int = 48,
    read: Callable[[str, tuple[int, int]], Box | None] = read_box,
) -> Answered:
    """Ask for a box, crop, ask again; see `Method.answer`. `read`: from the first round's text and the picture's size
    to a box, for models with another way to write one."""
    reading = start(model, images, question, options)
    item = reading.other_question(request.replace("{question}", question.question), max_box_tokens)
    row = prefill(model.engine, [item], reading.clock)[0]
    decode_row(model, row, reading.clock)
    reading.extra.update(completion_tokens=len(row.tokens), failures=0)
    box = read(row.stream.text, reading.size_px)
    if box is None:
        reading.extra["failures"] = 1
        note = f"Asked for a box, the model said {row.stream.text!r:.60}."
        return reading.answer_coarse(GateDecision(None, None, False, note))
    return reading.answer_zoomed([box_on(reading, box)])


AGENTIC = Method("agentic", ask_for_box)
