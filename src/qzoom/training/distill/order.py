"""What is trained on when: the whole run as a list of rows, fixed by the seed before it starts.

A row is a picture or a part of it with one or more of its questions, or a freshly drawn picture. Since the list says
everything, a run that is resumed at a step sees what an undisturbed one would have seen, boxes included.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qzoom.training.distill.data import Question
from qzoom.training.distill.windows import Windows

__all__ = ["Row", "count_rows", "make_order", "visit_rows"]


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
