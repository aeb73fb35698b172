"""Real receipts whose values change places, so that nothing can be answered from memory of the page.

There are a few hundred real receipts, and a model soon knows them by heart. Here the amounts of a page change places
with each other, all lines with the same amount alike, and the lines with the date and the company come from another
receipt. Print, paper and layout stay real; what is written where does not.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from PIL import Image

from tiny.pack import Box, PackedLine, PackedQuestion, Page
from tiny.receipt_data import only_line, paper_grey, value_questions

_AMOUNT = re.compile(r"(?:RM|MYR|\$)?\s*(-?\d{1,3}(?:,?\d{3})*\.\d\d)(?: [A-Z*]{1,2})?")
_LEAST_WIDTH = 0.75


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A printed line to copy: the picture it is in, its text and its box."""

    pixels: np.ndarray
    text: str
    box: Box


def exchange_values(page: Page, other: Page, rng: np.random.Generator) -> Page:
    """The page with amounts exchanged among its lines, and with the date and the company of `other`.

    What does not fit where it should stand, or is printed a second time inside a longer line, stays as it is.
    """
    answers: dict[str, str] = {}
    changes = _amounts(page, rng, answers)
    for field in ("date", "company"):
        changes |= _field(page, other, field, answers)
    pixels, lines = page.pixels.copy(), list(page.lines)
    moved: dict[Box, Box] = {}
    for index, (source, box) in changes.items():
        _paste(pixels, lines[index].box, source, box)
        moved[lines[index].box] = box
        lines[index] = PackedLine(source.text, box)
    questions = [_answered(q, answers, moved) for q in page.questions if q.field != "value"]
    return dataclasses.replace(
        page, pixels=pixels, lines=tuple(lines), questions=(*questions, *value_questions(tuple(lines)))
    )


def _amounts(page: Page, rng: np.random.Generator, answers: dict[str, str]) -> dict[int, tuple[_Source, Box]]:
    """Line -> what it shows from now on, and where; `answers` learns the new total."""
    places: dict[str, list[int]] = {}
    for index, line in enumerate(page.lines):
        found = _AMOUNT.fullmatch(line.text)
        if found:
            places.setdefault(found[1], []).append(index)
    alone = [index for indexes in places.values() for index in indexes]
    longer = [line.text for index, line in enumerate(page.lines) if index not in alone]
    values = [value for value in places if not any(value in text for text in longer)]
    total = next((q.answer for q in page.questions if q.field == "total"), None)
    changes: dict[int, tuple[_Source, Box]] = {}
    for value, number in zip(values, rng.permutation(len(values)), strict=True):
        if values[int(number)] == value:
            continue
        chosen = min((page.lines[index] for index in places[values[int(number)]]), key=lambda line: len(line.text))
        source = _Source(page.pixels, chosen.text, chosen.box)
        new = {index: (source, _fit(page, index, source, to_the_left=True)) for index in places[value]}
        fitting = {index: (source, box) for index, (source, box) in new.items() if box is not None}
        if len(fitting) == len(new):
            changes |= fitting
            if value == total:
                answers["total"] = values[int(number)]
    return changes


def _field(page: Page, other: Page, field: str, answers: dict[str, str]) -> dict[int, tuple[_Source, Box]]:
    """The line of a field, replaced by the other page's, where each is one line."""
    index, theirs = only_line(page, field), only_line(other, field)
    if index is None or theirs is None:
        return {}
    line = other.lines[theirs]
    source = _Source(other.pixels, line.text, line.box)
    box = _fit(page, index, source, to_the_left=False)
    if box is None:
        return {}
    answers[field] = next(q.answer for q in other.questions if q.field == field)
    return {index: (source, box)}


def _fit(page: Page, index: int, source: _Source, *, to_the_left: bool) -> Box | None:
    """Where the source stands in the line's place: as high, its right or left edge kept; None without room."""
    x0, y0, x1, y1 = page.lines[index].box
    wide = (source.box[2] - source.box[0]) * (y1 - y0) / (source.box[3] - source.box[1])
    least = round(wide * _LEAST_WIDTH)
    room = [x0, page.pixels.shape[1] - x1]
    for number, line in enumerate(page.lines):
        same_row = min(y1, line.box[3]) - max(y0, line.box[1]) > 0.3 * (y1 - y0)
        if number != index and same_row:
            room[0] = min(room[0], max(0, x0 - line.box[2])) if line.box[0] < x0 else room[0]
            room[1] = min(room[1], max(0, line.box[0] - x1)) if line.box[2] > x1 else room[1]
    most = x1 - x0 + room[0 if to_the_left else 1]
    if most < max(2, least):
        return None
    width = max(2, min(round(wide), most))
    return (x1 - width, y0, x1, y1) if to_the_left else (x0, y0, x0 + width, y1)


def _paste(pixels: np.ndarray, old: Box, source: _Source, box: Box) -> None:
    """Cover the old print with paper and show the source in `box`, on paper of the same grey."""
    covered = pixels[old[1] : old[3], old[0] : old[2]]
    paper = paper_grey(covered)
    covered[:] = int(paper)
    x0, y0, x1, y1 = source.box
    print_px = Image.fromarray(np.ascontiguousarray(source.pixels[y0:y1, x0:x1]))
    shown = np.asarray(print_px.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC), dtype=np.float32)
    shown = shown + paper - paper_grey(shown)
    pixels[box[1] : box[3], box[0] : box[2]] = np.clip(np.round(shown), 0, 255).astype(np.uint8)


def _answered(question: PackedQuestion, answers: dict[str, str], moved: dict[Box, Box]) -> PackedQuestion:
    """A question with its new answer and the places that show it."""
    if question.field not in answers:
        return question
    boxes = tuple(moved.get(box, box) for box in question.boxes)
    return dataclasses.replace(question, answer=answers[question.field], boxes=boxes)
