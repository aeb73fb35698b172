"""The attention of a prompt's last token to the picture's cells, for all layers and heads, without eager attention.

One prefill per prompt; the last token is run once more over the kept keys, and only its queries meet them.
Works for every backbone of the registry, since it uses nothing but their queries and layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qzoom.config import TokenBudget
from qzoom.data.samples import EvalQuestion, Task
from qzoom.errors import DataError, QZoomError
from qzoom.evaluation.methods.attention import GENERIC
from qzoom.evaluation.methods.base import Budget, Reading, start
from qzoom.evaluation.zoomgap import is_negative
from qzoom.types import Box

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = ["QuestionMaps", "question_maps"]


@dataclass(frozen=True, slots=True, eq=False)
class QuestionMaps:
    """One question's attention.

    Args:
        picture: id of the picture.
        index: number of the question among the picture's.
        kind: the question's field.
        boxes: places of the answer.
        size_px: (width, height) of the picture.
        asked: (layers, heads, rows, columns) of the question.
        generic: the same of the request that asks for nothing in particular.
        error: why there are no maps; the arrays are empty then.
    """

    picture: str
    index: int
    kind: str
    boxes: tuple[Box, ...]
    size_px: tuple[int, int]
    asked: np.ndarray
    generic: np.ndarray
    error: str | None = None


def question_maps(
    model: QZoom,
    task: Task,
    coarse: TokenBudget | None,
    *,
    limit: int | None = None,
    generic: str = GENERIC,
    on_picture: Callable[[int, int], None] | None = None,
) -> Iterator[QuestionMaps]:
    """The maps of every question with a place, picture by picture.

    Args:
        model: the model under test; its branches are not used.
        task: pictures, questions and places.
        coarse: limits of the look; None for the model's own.
        limit: the first so many pictures only.
        generic: the request that the questions are compared with.
        on_picture: told (pictures done, in all) after each.
    """
    from qzoom.model import QZoom

    plain = QZoom(dataclasses.replace(model.engine, gate=None, region=None), model.name, model.image_limits)
    ids = task.ids if limit is None else task.ids[:limit]
    for number, name in enumerate(ids):
        sample = task.sample(number)
        wanted = [(i, q) for i, q in enumerate(sample.questions) if q.boxes and not is_negative(q)]
        if wanted:
            yield from _of_picture(plain, name, sample.image, sample.size_px, wanted, coarse, generic, sample.error)
        if on_picture is not None:
            on_picture(number + 1, len(ids))


def _of_picture(
    model: QZoom,
    name: str,
    image: object,
    size_px: tuple[int, int],
    wanted: list[tuple[int, EvalQuestion]],
    coarse: TokenBudget | None,
    generic: str,
    error: str | None,
) -> Iterator[QuestionMaps]:
    session, compared = None, np.zeros(0)
    try:
        if error is None:
            session = model.session(image, coarse_tokens=coarse)
            size_px = session.pictures[0].size_px
            compared = _attention(start(model, session, EvalQuestion("", generic, ""), Budget(max_new_tokens=1)))
    except QZoomError as problem:
        session, error = None, str(problem)
    for index, question in wanted:
        about = (name, index, question.field, question.boxes, size_px)
        if session is None:
            yield QuestionMaps(*about, np.zeros(0), np.zeros(0), error)
            continue
        try:
            asked = _attention(start(model, session, question, Budget(max_new_tokens=1)))
        except QZoomError as problem:
            yield QuestionMaps(*about, np.zeros(0), np.zeros(0), str(problem))
            continue
        yield QuestionMaps(*about, asked, compared)


def _attention(reading: Reading) -> np.ndarray:
    """(layers, heads, rows, columns) float64 of the last prompt token to the first picture's cells."""
    import torch

    from qzoom.engine.attention import response_attention
    from qzoom.engine.batch import prefill

    engine, prompt = reading.model.engine, reading.look.state.prompt
    with torch.inference_mode():
        row = prefill(engine, [reading.look], reading.clock)[0]
        before = dataclasses.replace(prompt, ids=prompt.ids[:-1], positions=prompt.positions[:, :-1])
        cache = row.cache.truncated(len(before))
        every = range(engine.backbone.num_layers)
        found = response_attention(engine.backbone, before, cache, [int(prompt.ids[-1])], every)
    if not found:
        raise DataError("The prompt holds no picture, so there is no attention to it.")
    return found[0].values.double().cpu().numpy()
