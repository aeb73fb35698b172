"""What an example teaches beside its answers: where a page's text and objects, and the words of a question, lie in the
views of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from qzoom.data.questions import on_one_row
from qzoom.data.synthetic.texts import COLOURS, SHAPES
from tiny.batch import Example, Glyphs, Objects, Query, ReadLine, glyph_classes
from tiny.pack import Box, PackedLine, PackedQuestion, Page
from tiny.render_views import View

_WORD = re.compile(r"[A-Za-z][A-Za-z.&'-]*[A-Za-z]|[0-9]{2,}")
_ASKING = {"what", "which", "is", "the", "of", "in", "on", "for", "this", "does", "line", "say", "how", "much", "many"}


def build_example(task: str, views: list[View], page: Page, questions: Iterable[PackedQuestion]) -> Example:
    """The training example of these views of a page and these questions; one that is asked twice is asked once, or the
    model would learn to copy its own answer."""
    asked = list({question.question: question for question in reversed(list(questions))}.values())[::-1]
    drawn = any(line.char_boxes_px is not None for line in page.lines)
    return Example(
        task=task,
        views=tuple(view.pixels for view in views),
        glyphs=tuple(glyphs_in(view, page.lines) if drawn else None for view in views),
        queries=tuple(
            Query(q.question, q.answer, _points(q, views, page.lines), _asked_points(q, views, page)) for q in asked
        ),
        objects=None if page.objects is None else tuple(_objects(view, page) for view in views),
        read_lines=() if drawn else tuple(_read_lines(view, page) for view in views),
    )


def glyphs_in(view: View, lines: tuple[PackedLine, ...]) -> Glyphs:
    """All characters printed inside a view."""
    filled = [line for line in lines if line.char_boxes_px is not None and line.text]
    if not filled:
        return Glyphs(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    boxes = np.concatenate([line.char_boxes_px for line in filled if line.char_boxes_px is not None])
    classes = glyph_classes("".join(line.text for line in filled))
    centers = view.place_inside((boxes[:, :2] + boxes[:, 2:]) / 2)
    inside = ~np.isnan(centers[:, 0])
    return Glyphs(centers[inside], ((boxes[:, 3] - boxes[:, 1]) * view.scale[1])[inside], classes[inside])


def _read_lines(view: View, page: Page) -> tuple[ReadLine, ...]:
    """The transcribed lines that lie whole inside a view and are at least 9 px high in it."""
    found = []
    for line in page.lines:
        x0, y0, x1, y1 = line.box
        if (y1 - y0) * view.scale[1] < 9 or len(line.text) > 48:
            continue
        ends = view.place(np.array([[x0, (y0 + y1) / 2], [x1, (y0 + y1) / 2]], dtype=np.float32))
        wide, high = view.size_wh
        if ends[0, 0] < -4 or ends[1, 0] > wide + 4 or ends[:, 1].min() < 3 or ends[:, 1].max() > high - 3:
            continue
        left, right = (float(ends[0, 0]), float(ends[0, 1])), (float(ends[1, 0]), float(ends[1, 1]))
        found.append(ReadLine(left, right, line.text.replace(" ", ""), page.capitals))
    return tuple(found)


def _objects(view: View, page: Page) -> Objects:
    """The objects' boxes in view pixels, cut at its edges, with their colour and shape numbers."""
    things = page.objects or ()
    colours = list(COLOURS)
    corners = np.array([thing.box for thing in things], dtype=np.float32).reshape(-1, 2)
    moved = np.clip(view.place(corners), 0, np.array(view.size_wh)).reshape(-1, 4)
    kinds = [(colours.index(thing.colour) + 1, SHAPES.index(thing.shape) + 1) for thing in things]
    seen = ((moved[:, 2:] - moved[:, :2]) > 0).all(axis=1)
    return Objects(moved[seen], np.array(kinds, dtype=np.int64).reshape(-1, 2)[seen])


def _points(question: PackedQuestion, views: list[View], lines: tuple[PackedLine, ...]) -> np.ndarray | None:
    """Where every character of the answer is printed in every view, (chars, views, 2), or None when it is not known."""
    parts: list[np.ndarray] = []
    for number, start, stop in _spans(question, lines):
        parts += [np.full((1, 2), np.nan, dtype=np.float32)] if parts else []
        parts.append(_centers(lines[number], start, stop))
    if not parts or sum(map(len, parts)) != len(question.answer):
        return None
    return _in_views(np.concatenate(parts), views)


def _spans(question: PackedQuestion, lines: tuple[PackedLine, ...]) -> tuple[tuple[int, int, int], ...]:
    """The characters that spell the answer; where they were not packed, those of a line at one of its places."""
    if question.spans:
        return question.spans
    for box in question.boxes:
        for number, line in enumerate(lines):
            start = line.text.upper().find(question.answer.upper())
            if start >= 0 and on_one_row(box, line.box) and _overlaps(box, line.box):
                return ((number, start, start + len(question.answer)),)
    return ()


def _asked_points(question: PackedQuestion, views: list[View], page: Page) -> np.ndarray | None:
    """Where the question's words are to be seen beside the answer, in every view: printed on its row, or else in the
    column above it, or as colour and shape of its object. (chars, views, 2), NaN for the other characters; None where
    no word is."""
    spans = _spans(question, page.lines)
    if not (spans or question.boxes):
        return None
    answer = page.lines[spans[0][0]].box if spans else question.boxes[0]
    things = (thing for thing in page.objects or () if _overlaps(answer, thing.box) and on_one_row(answer, thing.box))
    thing = next(things, None)
    row = [number for number, line in enumerate(page.lines) if on_one_row(answer, line.box)]
    above = [n for n, line in enumerate(page.lines) if line.box[3] <= answer[3] and _overlaps(answer, line.box)]
    centers = np.full((len(question.question), 2), np.nan, dtype=np.float32)
    for word in _WORD.finditer(question.question):
        place = slice(word.start(), word.end())
        if thing is not None and word.group() in (thing.colour, thing.shape):
            centers[place] = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        elif word.group().lower() not in _ASKING:
            printed = re.compile(rf"\b{re.escape(word.group())}\b", re.IGNORECASE)
            for number in (*row, *reversed(above)):
                found = printed.search(page.lines[number].text)
                if found is not None and not any(
                    number == other and start < found.end() and found.start() < stop for other, start, stop in spans
                ):
                    centers[place] = _centers(page.lines[number], *found.span())
                    break
    return None if np.isnan(centers).all() else _in_views(centers, views)


def _in_views(centers: np.ndarray, views: list[View]) -> np.ndarray:
    return np.stack([view.place_inside(centers.copy()) for view in views], axis=1)


def _centers(line: PackedLine, start: int, stop: int) -> np.ndarray:
    """Centres (n, 2) of these characters; in a line without character boxes all are taken to be equally wide."""
    boxes = _equal_boxes(line) if line.char_boxes_px is None else line.char_boxes_px
    return (boxes[start:stop, :2] + boxes[start:stop, 2:]) / 2


def _overlaps(first: Box, second: Box) -> bool:
    """Whether they overlap from left to right."""
    return min(first[2], second[2]) > max(first[0], second[0])


def _equal_boxes(line: PackedLine) -> np.ndarray:
    x0, y0, x1, y1 = line.box
    edges = np.linspace(x0, x1, len(line.text) + 1, dtype=np.float32)
    heights = np.ones(len(line.text), dtype=np.float32)
    return np.stack([edges[:-1], heights * y0, edges[1:], heights * y1], axis=1)
