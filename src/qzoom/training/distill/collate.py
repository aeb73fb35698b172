"""Rows to tensors for the stock model: one sequence holds a picture and the questions about it.

Questions of one sequence are branches: each sees the picture and itself, and its positions start where the picture
ends, so it is trained as if it were alone while the picture is paid for once. A question whose region is marked gets a
sequence of its own, since its picture is another one.

              picture   question 1   question 2          x: may attend
    picture      x
    question 1   x          x
    question 2   x                       x
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qzoom.evaluation.coverage.cells import covered_cells
from qzoom.training.distill.data import Question
from qzoom.training.distill.order import Row
from qzoom.training.distill.prompts import Asked, Prompter, View
from qzoom.training.distill.windows import questions_inside, regions_of, shifted
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Collator", "Drawn", "Sequence4", "build_sequence", "pad_sequences"]

IGNORE = -100

Drawn = Callable[[int], "tuple[PIL.Image.Image, list[tuple[str, str]]]"]
"""From a seed to a picture and its (question, answer) pairs."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence4:
    """A picture with its questions.

    Args:
        ids: (length,) tokens.
        positions: (axes, length).
        branch: (length,) 0 for the picture and what stands before it, 1 and up for the questions.
        labels: (length,) the token itself where it belongs to a reply, else -100.
        view: the picture.
        regions: (questions, length) true at the visual tokens that the question's region touches; None unless wanted.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    labels: Tensor
    view: View
    regions: Tensor | None = None


class Collator:
    """Turns the rows of a dataset (numbers into the run's order) into one batch of tensors.

    Args:
        prompter: makes views and prompts.
        questions: that the rows point to.
        rows: the run's order.
        drawn: makes replayed pictures.
        masked: give every batch a 4-D mask, for attention that wants one.
        regions: give every batch its questions' regions, see `Sequence4`.
    """

    def __init__(
        self,
        prompter: Prompter,
        questions: Sequence[Question],
        rows: Sequence[Row],
        drawn: Drawn | None = None,
        *,
        masked: bool = False,
        regions: bool = False,
    ) -> None:
        self._prompter = prompter
        self._questions = questions
        self._rows = rows
        self._drawn = drawn
        self._masked = masked
        self._regions = regions

    def __call__(self, entries: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        """The batch of these entries, each {"row": number}."""
        sequences = [sequence for entry in entries for sequence in self.sequences(self._rows[entry["row"]])]
        pad = int(self._prompter.engine.backbone.tokenizer.pad_token_id)
        return pad_sequences(sequences, pad, masked=self._masked)

    def sequences(self, row: Row) -> list[Sequence4]:
        """A row's sequences: one for all unmarked questions, one for every marked one."""
        prompter = self._prompter
        if row.drawn >= 0:
            if self._drawn is None:
                raise ValueError("A drawn row needs something that draws.")
            picture, pairs = self._drawn(row.drawn)
            return [build_sequence(prompter, prompter.view(picture, row.tokens), [prompter.asked(*p) for p in pairs])]
        windowed = self._windowed(row) if row.window else None
        if windowed is not None:
            return [windowed]
        alone: list[tuple[Question, str]] = []
        shared: list[tuple[Question, str]] = []
        for question in self._of(row):
            style = prompter.style_of(question, row.visit, row.progress)
            (shared if style in ("none", "text") else alone).append((question, style))
        out = []
        for group in ([shared] if shared else []) + [[entry] for entry in alone]:
            first, style = group[0]
            view = prompter.view(prompter.picture(first, style, row.tokens), row.tokens)
            asked = [prompter.asked(prompter.wording(q, s), q.answer) for q, s in group]
            made = build_sequence(prompter, view, asked)
            size_px = self._prompter.size_px(first.picture)
            out.append(self._with_regions(made, [q.box for q, _ in group], size_px))
        return out

    def _windowed(self, row: Row) -> Sequence4 | None:
        """A part of the row's picture with the questions that it can be asked, unmarked; None where there are none."""
        prompter, group = self._prompter, self._of(row)
        if not regions_of(group):
            return None
        picture, window = prompter.part(group, row)
        shown = questions_inside(group, window, row.place)
        if not shown:
            return None
        asked = [prompter.asked(prompter.wording(q, "none"), q.answer) for q in shown]
        made = build_sequence(prompter, prompter.view(picture, row.window), asked)
        return self._with_regions(made, [shifted(q.box, window) for q in shown], picture.size)

    def _of(self, row: Row) -> list[Question]:
        return [self._questions[index] for index in row.questions]

    def _with_regions(self, made: Sequence4, boxes: Sequence[Box | None], size_px: tuple[int, int]) -> Sequence4:
        """The sequence with the visual tokens of its questions' regions, if wanted; none where there is no box."""
        if not self._regions:
            return made
        visual = (made.ids == self._prompter.engine.backbone.image_token_id).nonzero().squeeze(1)
        regions = torch.zeros(len(boxes), len(made.ids), dtype=torch.bool)
        for index, box in enumerate(boxes):
            if box is not None:
                touched = covered_cells([box], size_px, made.view.cells) > 0
                regions[index, visual] = torch.from_numpy(touched.ravel())
        return dataclasses.replace(made, regions=regions)


def build_sequence(prompter: Prompter, view: View, asked: Sequence[Asked]) -> Sequence4:
    """One sequence of a picture and its questions, which share their prompt up to the picture's end."""
    backbone = prompter.engine.backbone
    first = prompter.expand(asked[0].ids, view.cells)
    fork = _end_of_picture(first, backbone.image_token_id) + len(backbone.block_ids[1])
    prefix = first[:fork]
    stem = prompter.positions(prefix, view.cells)
    ids, labels, branch, places = list(prefix), [IGNORE] * fork, [0] * fork, [stem]
    begin = int(stem.max()) + 1
    for number, one in enumerate(asked, start=1):
        prompt = prompter.expand(one.ids, view.cells)
        if prompt[:fork] != prefix:
            raise ValueError("Questions of one sequence must share what stands before the picture's end.")
        tail = [*prompt[fork:], *one.reply]
        ids += tail
        labels += [IGNORE] * (len(prompt) - fork) + list(one.reply)
        branch += [number] * len(tail)
        places.append(torch.arange(begin, begin + len(tail)).expand(stem.shape[0], -1))
    return Sequence4(torch.tensor(ids), torch.cat(places, dim=1), torch.tensor(branch), torch.tensor(labels), view)


def pad_sequences(sequences: Sequence[Sequence4], pad: int, *, masked: bool = False) -> dict[str, Any]:
    """A batch (B, S) padded on the right, with a 4-D mask (B, 1, S, S), true = may attend.

    A batch of single questions needs no branches and gets the usual 2-D mask, unless it is to be masked all the same.
    """
    length = max(len(s.ids) for s in sequences)
    count = len(sequences)
    ids = torch.full((count, length), pad)
    labels = torch.full((count, length), IGNORE)
    branch = torch.full((count, length), -1)
    positions = torch.zeros(sequences[0].positions.shape[0], count, length, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids[index, :size] = sequence.ids
        labels[index, :size] = sequence.labels
        branch[index, :size] = sequence.branch
        positions[:, index, :size] = sequence.positions
    single = int(branch.max()) <= 1 and not masked
    return _padded_regions(sequences, length) | {
        "input_ids": ids,
        "attention_mask": (branch >= 0).long() if single else _branch_mask(branch),
        "position_ids": positions,
        "labels": labels,
        "pixel_values": torch.cat([s.view.pixels for s in sequences]),
        "image_grid_thw": torch.cat([s.view.grid_thw for s in sequences]),
    }


def _padded_regions(sequences: Sequence[Sequence4], length: int) -> dict[str, Tensor]:
    """Regions (B, most questions, S) and branches (B, S) where any sequence has regions; drawn pictures have none."""
    if all(s.regions is None for s in sequences):
        return {}
    most = max(int(s.branch.max()) for s in sequences)
    regions = torch.zeros(len(sequences), most, length, dtype=torch.bool)
    branch = torch.full((len(sequences), length), -1)
    for index, sequence in enumerate(sequences):
        branch[index, : len(sequence.branch)] = sequence.branch
        if sequence.regions is not None:
            count, size = sequence.regions.shape
            regions[index, :count, :size] = sequence.regions
    return {"regions": regions, "branch": branch}


def _branch_mask(branch: Tensor) -> Tensor:
    """Causal, and only the picture or the own question; padding sees itself, so that no row is empty."""
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    return ((same | (branch == 0)[:, None, :]) & causal)[:, None]


def _end_of_picture(ids: Sequence[int], mark: int) -> int:
    return len(ids) - list(reversed(ids)).index(mark)
