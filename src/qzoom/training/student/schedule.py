"""What is trained on when: the whole run as a list of rows, fixed by the seed before it starts.

A row is a picture or a part of it with one or more of its questions, or a freshly drawn picture. Since the list says
everything, a run that is resumed at a step sees what an undisturbed one would have seen, boxes included.

Freshly drawn pictures with questions of their own, mixed in so that a small student does not forget.

They are drawn from seeds that training may use; held-out seeds stay unseen.

Parts of a picture instead of the whole, at any sharpness between the whole view's and the crop's.

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
from typing import TYPE_CHECKING

import numpy as np

from qzoom.config import from_mapping
from qzoom.data.overlay import Fade
from qzoom.data.synthetic.documents import render_document
from qzoom.data.synthetic.records import TRAIN_SEEDS
from qzoom.data.synthetic.scenes import render_scene
from qzoom.errors import ConfigError
from qzoom.images.geometry import contains
from qzoom.training.student.data import Question
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "Row",
    "Windows",
    "count_rows",
    "draw_replay",
    "make_order",
    "questions_inside",
    "regions_of",
    "shifted",
    "visit_rows",
    "window_around",
]


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of one step.

    Args:
        questions: indices of its questions; empty for a drawn picture.
        visit: which pass over the data, from 0.
        progress: share of the training that is done before it.
        tokens: largest number of visual tokens; 0 takes the model's own.
        drawn: seed of a drawn picture; -1 for the data's own.
        window: most visual tokens of a part of the picture; 0 shows the whole.
        place: decides which part.
    """

    questions: tuple[int, ...]
    visit: int
    progress: float
    tokens: int
    drawn: int = -1
    window: int = 0
    place: int = 0


def visit_rows(
    questions: Sequence[Question], most: int, negatives: float | None, visit: int, seed: int
) -> list[tuple[int, ...]]:
    """One pass: every question once, those of a picture in groups of at most `most`, all in an order by seed.

    With `negatives` set, negative questions are left out or repeated until they are that share.
    """
    rng = random.Random(f"{seed}/order/{visit}")
    groups: dict[str, list[int]] = {}
    for index in _with_share(questions, negatives, rng):
        groups.setdefault(questions[index].picture, []).append(index)
    rows = []
    for group in groups.values():
        rng.shuffle(group)
        rows += [tuple(group[i : i + most]) for i in range(0, len(group), most)]
    rng.shuffle(rows)
    return rows


def count_rows(questions: Sequence[Question], most: int, negatives: float | None, seed: int) -> int:
    """Rows of the first pass; others differ by a few."""
    return len(visit_rows(questions, most, negatives, 0, seed))


def make_order(
    questions: Sequence[Question],
    *,
    steps: int,
    batch: int,
    most: int,
    tokens: Sequence[int],
    negatives: float | None,
    replay: float,
    seed: int,
    windows: Windows | None = None,
) -> list[Row]:
    """All rows of a run, `batch` to a step.

    Args:
        questions: to train on.
        steps: optimiser steps.
        batch: rows a step.
        most: questions a row.
        tokens: budgets, one drawn per step; empty for the model's own.
        negatives: see `visit_rows`.
        replay: share of drawn pictures, spread evenly.
        seed: of everything.
        windows: parts of pictures that some steps show instead; None for none.
    """
    total = steps * batch
    rows: list[Row] = []
    waiting: list[tuple[int, ...]] = []
    visit = -1
    for position in range(total):
        step = position // batch
        budget = random.Random(f"{seed}/tokens/{step}").choice(list(tokens)) if tokens else 0
        progress = position / total
        if math.floor((position + 1) * replay + 1e-9) > math.floor(position * replay + 1e-9):
            drawn = random.Random(f"{seed}/drawn/{position}").randrange(2**31)
            rows.append(Row((), 0, progress, budget, drawn))
            continue
        if not waiting:
            visit += 1
            waiting = visit_rows(questions, most, negatives, visit, seed)[::-1]
        window = windows.draw(step / steps, f"{seed}/window/{step}") if windows is not None else 0
        place = random.Random(f"{seed}/place/{position}").randrange(2**31) if window else 0
        rows.append(Row(waiting.pop(), visit, progress, budget, window=window, place=place))
    return rows


def _with_share(questions: Sequence[Question], share: float | None, rng: random.Random) -> list[int]:
    negative = [i for i, q in enumerate(questions) if q.negative]
    positive = [i for i, q in enumerate(questions) if not q.negative]
    if share is None or not negative or not positive:
        return [*range(len(questions))]
    wanted = round(share / (1 - share) * len(positive))
    whole, rest = divmod(wanted, len(negative))
    return positive + negative * whole + rng.sample(negative, rest)


def draw_replay(seed: int, most: int = 6) -> tuple[PIL.Image.Image, list[tuple[str, str]]]:
    """A document or a scene with some of its questions.

    Args:
        seed: decides the picture, its questions and their order.
        most: questions.

    Returns:
        The picture and its (question, answer) pairs.
    """
    rng = np.random.default_rng(seed)
    render = render_document if rng.random() < 0.5 else render_scene
    sample = render(int(rng.integers(TRAIN_SEEDS.start, TRAIN_SEEDS.stop)), font_set="train")
    weight = np.array([3.0 if q.field in ("total", "date", "company") else 1.0 for q in sample.questions])
    order = np.argsort(-weight * rng.random(len(weight)) ** 0.5)[:most]
    chosen = [sample.questions[int(index)] for index in order]
    return sample.image, [(question.question, question.answer) for question in chosen]


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
