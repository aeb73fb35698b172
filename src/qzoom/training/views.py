"""Views of a rendered picture: a resized whole or crop, with its characters and answers mapped into it.

A renderer works in original pixels; the model sees views of a few dozen or hundred visual tokens. Everything that
training knows about where text is printed passes through here.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from qzoom.data.synthetic.page import SceneObject, SyntheticQuestion, TextLine
from qzoom.data.synthetic.texts import COLOURS, SHAPES
from qzoom.training.batch import Example, Glyphs, Objects, Query, glyph_classes
from qzoom.training.tiny import TOKEN_PX

__all__ = ["View", "build_example", "cut_view"]


class View:
    """A crop `box` (x0, y0, x1, y1, original pixels) of a picture at `tokens_wh` tokens; `pixels` is uint8 RGB."""

    def __init__(self, image: Image.Image, box: tuple[float, float, float, float], tokens_wh: tuple[int, int]) -> None:
        size = (tokens_wh[0] * TOKEN_PX, tokens_wh[1] * TOKEN_PX)
        if box == (0, 0, *image.size) and image.size == size:
            small = image
        else:
            small = image.resize(size, Image.Resampling.BICUBIC, box=box)
        self.pixels = np.asarray(small.convert("RGB"))
        self._offset = np.array(box[:2], dtype=np.float32)
        self._scale = np.array([size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])], dtype=np.float32)
        self._size = np.array(size, dtype=np.float32)

    def place(self, centers_px: np.ndarray) -> np.ndarray:
        """Original-pixel points (n, 2) in view pixels; NaN where they fall outside the view."""
        moved = (centers_px - self._offset) * self._scale
        outside = ((moved < 0) | (moved >= self._size)).any(axis=1)
        moved[outside] = np.nan
        return moved

    def glyphs(self, lines: tuple[TextLine, ...]) -> Glyphs:
        """All characters printed inside this view."""
        filled = [line for line in lines if line.text]
        if not filled:
            return Glyphs(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        boxes = np.concatenate([line.char_boxes_px for line in filled])
        classes = glyph_classes("".join(line.text for line in filled))
        centers = self.place(_centers(boxes))
        heights = (boxes[:, 3] - boxes[:, 1]) * self._scale[1]
        inside = ~np.isnan(centers[:, 0])
        return Glyphs(centers[inside], heights[inside], classes[inside])

    def objects(self, objects: tuple[SceneObject, ...]) -> Objects:
        """The objects' boxes in view pixels, cut at its edges, with their colour and shape numbers."""
        colours = list(COLOURS)
        boxes = np.array([thing.box for thing in objects], dtype=np.float32).reshape(-1, 2, 2)
        moved = np.clip((boxes - self._offset) * self._scale, 0, self._size).reshape(-1, 4)
        kinds = [(colours.index(thing.colour) + 1, SHAPES.index(thing.shape) + 1) for thing in objects]
        seen = ((moved[:, 2:] - moved[:, :2]) > 0).all(axis=1)
        return Objects(moved[seen], np.array(kinds, dtype=np.int64).reshape(-1, 2)[seen])


def cut_view(image: Image.Image, box: tuple[float, float, float, float] | None, tokens_wh: tuple[int, int]) -> View:
    """The view of a box, or of the whole picture without one."""
    return View(image, box if box is not None else (0, 0, *image.size), tokens_wh)


def build_example(
    task: str,
    views: list[View],
    lines: tuple[TextLine, ...],
    questions: list[SyntheticQuestion],
    *,
    with_glyphs: bool = True,
    objects: tuple[SceneObject, ...] | None = None,
) -> Example:
    """The training example of these views and questions."""
    return Example(
        task=task,
        views=tuple(view.pixels for view in views),
        glyphs=tuple(view.glyphs(lines) if with_glyphs else None for view in views),
        queries=tuple(Query(q.question, q.answer, _points(q, views, lines)) for q in questions),
        objects=None if objects is None else tuple(view.objects(objects) for view in views),
    )


def _points(question: SyntheticQuestion, views: list[View], lines: tuple[TextLine, ...]) -> np.ndarray | None:
    """Where every character of the answer is printed in every view, (chars, views, 2), or None when it is not."""
    if not question.spans:
        return None
    gap = np.full((1, 2), np.nan, dtype=np.float32)
    parts: list[np.ndarray] = []
    for span in question.spans:
        parts += [gap] if parts else []
        parts.append(_centers(lines[span.line].char_boxes_px[span.start : span.stop]))
    centers = np.concatenate(parts)
    if len(centers) != len(question.answer):
        return None
    return np.stack([view.place(centers.copy()) for view in views], axis=1)


def _centers(boxes: np.ndarray) -> np.ndarray:
    return np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], axis=1)
