"""What is trained on when: the whole run as a list of entries, fixed by the seed before it starts.

An entry is an image with some of its questions; a random crop of it, which leaves less to search than the whole view
(an addition of this project: the authors, arXiv 2602.11858, train on whole images only); or rehearsal data, a freshly
drawn image with questions of its own, against forgetting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import PIL.Image
from pydantic import Field

from qzoom.data.overlay import ShareSchedule
from qzoom.data.questions import RECEIPT_FIELDS
from qzoom.data.synthetic.documents import render_document
from qzoom.data.synthetic.page import TRAIN_SEEDS
from qzoom.data.synthetic.scenes import render_scene
from qzoom.errors import ConfigError
from qzoom.images.geometry import contains
from qzoom.settings import Between, settings
from qzoom.training.student.data import ExportedQuestion
from qzoom.types import Box


@dataclass(frozen=True, slots=True)
class ScheduleEntry:
    """One image of one step."""

    questions: tuple[int, ...]  # indices of its questions; empty for rehearsal
    epoch: int  # which pass over the data, from 0
    progress: float  # share of the training that is done before it
    tokens: int  # largest number of visual tokens; 0 takes the model's own
    rehearsal: int = -1  # seed of a drawn image; -1 for the data's own
    crop_tokens: int = 0  # most visual tokens of a random crop; 0 shows the whole image
    crop_seed: int = 0  # decides where the crop lies


def epoch_entries(
    questions: Sequence[ExportedQuestion], most: int, negatives: float | None, epoch: int, seed: int
) -> list[tuple[int, ...]]:
    """One epoch: every question once, those of an image in groups of at most `most`, all in an order by seed.

    With `negatives` set, negative questions are left out or repeated until they are that share.
    """
    rng = random.Random(f"{seed}/order/{epoch}")
    groups: dict[str, list[int]] = {}
    for index in _with_share(questions, negatives, rng):
        groups.setdefault(questions[index].picture, []).append(index)
    rows = []
    for group in groups.values():
        rng.shuffle(group)
        rows += [tuple(group[i : i + most]) for i in range(0, len(group), most)]
    rng.shuffle(rows)
    return rows


def make_schedule(
    questions: Sequence[ExportedQuestion],
    *,
    steps: int,
    batch: int,
    most: int,
    tokens: Sequence[int],
    negatives: float | None,
    rehearsal: float,
    seed: int,
    crops: RandomCrops | None = None,
) -> list[ScheduleEntry]:
    """All entries of a run, `batch` to a step.

    Args:
        tokens: budgets, one drawn per step; empty for the model's own.
        negatives: see `epoch_entries`.
        rehearsal: share of drawn images, spread evenly.
    """
    total = steps * batch
    entries: list[ScheduleEntry] = []
    waiting: list[tuple[int, ...]] = []
    epoch = -1
    for position in range(total):
        step = position // batch
        budget = random.Random(f"{seed}/tokens/{step}").choice(list(tokens)) if tokens else 0
        progress = position / total
        if math.floor((position + 1) * rehearsal + 1e-9) > math.floor(position * rehearsal + 1e-9):
            drawn = random.Random(f"{seed}/drawn/{position}").randrange(2**31)
            entries.append(ScheduleEntry((), 0, progress, budget, drawn))
            continue
        if not waiting:
            epoch += 1
            waiting = epoch_entries(questions, most, negatives, epoch, seed)[::-1]
        crop = crops.draw(step / steps, f"{seed}/window/{step}") if crops is not None else 0
        crop_seed = random.Random(f"{seed}/place/{position}").randrange(2**31) if crop else 0
        entries.append(ScheduleEntry(waiting.pop(), epoch, progress, budget, crop_tokens=crop, crop_seed=crop_seed))
    return entries


def _with_share(questions: Sequence[ExportedQuestion], share: float | None, rng: random.Random) -> list[int]:
    negative = [i for i, q in enumerate(questions) if q.negative]
    positive = [i for i, q in enumerate(questions) if not q.negative]
    if share is None or not negative or not positive:
        return [*range(len(questions))]
    wanted = round(share / (1 - share) * len(positive))
    whole, rest = divmod(wanted, len(negative))
    return positive + negative * whole + rng.sample(negative, rest)


def draw_rehearsal(seed: int, most: int = 6) -> tuple[PIL.Image.Image, list[tuple[str, str]]]:
    """A drawn document or scene and at most so many (question, answer) pairs, from the seeds that training may use."""
    rng = np.random.default_rng(seed)
    render = render_document if rng.random() < 0.5 else render_scene
    sample = render(int(rng.integers(TRAIN_SEEDS.start, TRAIN_SEEDS.stop)), font_set="train", reword=True)
    weight = np.array([3.0 if q.field in RECEIPT_FIELDS else 1.0 for q in sample.questions])
    order = np.argsort(-weight * rng.random(len(sample.questions)) ** 0.5)
    questions = [sample.questions[int(i)] for i in order[:most]]
    return sample.image, [(question.question, question.answer) for question in questions]


_ASPECTS = (0.6, 1.7)
_ROOM = 1.1


@settings
class RandomCrops:
    """When and how random crops are shown."""

    share: ShareSchedule = field(default_factory=lambda: ShareSchedule(0.0, 0.0, "constant"))
    """Share of the steps that show crops, over the training."""
    tokens: tuple[Annotated[int, Between(1)], ...] = (144,)
    """Most visual tokens of a crop, one drawn per step."""
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Highest resolution, in pixels of the view per pixel of the image; the lowest is the whole view's."""

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ConfigError("random_crops: tokens must be a list of at least one whole number.")

    def draw(self, progress: float, seed: str) -> int:
        """Visual tokens of a step's crops, drawn by the seed; 0 if it shows whole images."""
        rng = random.Random(seed)
        return rng.choice(self.tokens) if rng.random() < self.share.share(progress) else 0


def random_crop(
    target: Box, size_px: tuple[int, int], area_px: int, scales: tuple[float, float], rng: random.Random
) -> Box:
    """A crop that contains a box, in original pixels; the whole image if the crop would be as large.

    Args:
        area_px: of the crop's view, in its own pixels.
        scales: lowest and highest resolution, in pixels of the view per pixel of the image.
    """
    scale = math.exp(rng.uniform(math.log(min(scales)), math.log(scales[1])))
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


def regions_of(questions: Sequence[ExportedQuestion]) -> list[Box]:
    """Regions that a crop can be put around: those of questions about what is there."""
    return [q.box for q in questions if q.box is not None and not q.negative]


def questions_in_crop(questions: Sequence[ExportedQuestion], crop: Box, seed: int) -> list[ExportedQuestion]:
    """Questions that can be asked about a crop: their region lies in it, or their target is nowhere in the image.

    The same share is kept of the latter as of the former, so that crops ask no more often for absent targets. At least
    one of the questions, which are about one image, has a region.
    """
    regions, rng = regions_of(questions), random.Random(seed)
    share = sum(contains(crop, box) for box in regions) / len(regions)
    return [
        q for q in questions if (rng.random() < share if q.negative else q.box is not None and contains(crop, q.box))
    ]


def box_in_crop(box: Box | None, crop: Box) -> Box | None:
    """A box of the image in pixels of the crop; None if it is not wholly inside."""
    if box is None or not contains(crop, box):
        return None
    return box[0] - crop[0], box[1] - crop[1], box[2] - crop[0], box[3] - crop[1]
