"""Attention of every question's last prompt token to the image's cells, for all layers and heads.

It works for every backbone of the registry, since it uses only its queries and layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qzoom.config import TokenBudget
from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.engine.request import Options
from qzoom.engine.session import Session
from qzoom.errors import QZoomError
from qzoom.evaluation.methods.attention import GENERIC, prompt_attention
from qzoom.evaluation.methods.base import start
from qzoom.evaluation.zoomgap import is_negative
from qzoom.model import QZoom
from qzoom.types import Box


@dataclass(frozen=True, slots=True, eq=False)
class QuestionMaps:
    """One question's attention."""

    picture: str
    index: int
    kind: str
    boxes: tuple[Box, ...]
    size_px: tuple[int, int]  # (width, height) of the picture
    question: np.ndarray  # (layers, heads, rows, columns) of the question
    generic: np.ndarray  # the same of the request that asks for nothing in particular
    error: str | None = None  # why there are no maps; the arrays are empty then


def question_maps(
    model: QZoom,
    task: Task,
    coarse: TokenBudget | None,
    *,
    limit: int | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> Iterator[QuestionMaps]:
    """The maps of every question with a place, picture by picture. `on_picture`: called with (pictures done, in all)
    after each."""
    model.engine.backbone.need_bare_grid("Measuring coverage")
    plain = QZoom(dataclasses.replace(model.engine, gate=None, region=None), model.name, model.image_limits)
    ids = task.ids if limit is None else task.ids[:limit]
    for number in range(len(ids)):
        yield from _picture_maps(plain, task.sample(number), Options(zoom="never", coarse_tokens=coarse))
        if on_picture is not None:
            on_picture(number + 1, len(ids))


def _picture_maps(model: QZoom, sample: Sample, options: Options) -> Iterator[QuestionMaps]:
    placed = [(i, q) for i, q in enumerate(sample.questions) if q.boxes and not is_negative(q)]
    if not placed:
        return
    none = np.zeros(0)
    session, generic, error, size_px = None, none, sample.error, sample.size_px
    try:
        if error is None:
            session = model.session(sample.image, coarse_tokens=options.coarse_tokens)
            size_px = session.pictures[0].size_px
            generic = _maps(model, session, SampleQuestion("", GENERIC, ""), options)
    except QZoomError as problem:
        session, error = None, str(problem)
    for index, question in placed:
        own, failure = none, error
        if session is not None:
            try:
                own = _maps(model, session, question, options)
            except QZoomError as problem:
                failure = str(problem)
        maps = (own, none if failure else generic)
        yield QuestionMaps(sample.id, index, question.field, question.boxes, size_px, *maps, failure)


def _maps(model: QZoom, session: Session, question: SampleQuestion, options: Options) -> np.ndarray:
    """(layers, heads, rows, columns) float64 of the last prompt token to the first picture's cells."""
    reading = start(model, session, question, options)
    values = prompt_attention(reading, reading.coarse, range(model.engine.backbone.num_layers))
    return np.asarray(values.double().cpu().numpy())
