"""A question and its picture as the model is asked later: the engine's own words, tokens, positions and pixels.

Training and `qzoom ask --zoom never` share every function between the question and the tensors, so a student learns
the prompt that it will get.

Rows to tensors for the stock model: one sequence holds a picture and the questions about it.

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
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qzoom.data.cells import covered_cells
from qzoom.data.overlay import choose_style, clause, draw, has_box
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.request import Options, budget, coarse_budget
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.images.load import load_image
from qzoom.training.student.data import Question
from qzoom.training.student.recipe import DistillRecipe
from qzoom.training.student.rewards import wrap
from qzoom.training.student.schedule import Row, questions_inside, regions_of, shifted, window_around
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

    from qzoom.config import TokenBudget
    from qzoom.training.student.schedule import Row

__all__ = ["Asked", "Collator", "Drawn", "Prompter", "Sequence4", "View", "build_sequence", "pad_sequences"]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A picture as the vision tower takes it.

    Args:
        pixels: (patches, values).
        grid_thw: (1, 3) patches in time, height and width.
        cells: (rows, columns) of visual tokens.
    """

    pixels: Tensor
    grid_thw: Tensor
    cells: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """A tokenised question with its right reply.

    Args:
        ids: prompt up to the assistant's header, one placeholder for the picture.
        reply: token ids of the reply, the end token last.
    """

    ids: tuple[int, ...]
    reply: tuple[int, ...]


class Prompter:
    """Makes views and prompts for one engine and recipe.

    Args:
        engine: the student.
        recipe: overlay, clause, instruction and form of the answer.
    """

    def __init__(self, engine: Engine, recipe: DistillRecipe) -> None:
        self.engine = engine
        self.recipe = recipe
        self._chat = ChatEncoder(engine.backbone)
        self._room = int(recipe.cache_gb * 1e9)
        self._kept: OrderedDict[tuple[str, int], PIL.Image.Image] = OrderedDict()
        self._used = 0
        self._sizes: dict[str, tuple[int, int]] = {}

    def budget_of(self, tokens: int) -> TokenBudget:
        """Limits on the visual tokens of the full view; 0 takes what the engine takes by itself."""
        standard = coarse_budget(self.engine, Options())
        return (budget(tokens, standard) if tokens else None) or standard

    def style_of(self, question: Question, visit: int, progress: float) -> str:
        """How the region is marked this time; "none" without a box, or when the schedule says so."""
        if question.box is None or not has_box(question.id, visit, self.recipe.fade.share(progress)):
            return "none"
        return choose_style(question.id, visit, self.recipe.styles)

    def view(self, picture: PIL.Image.Image, tokens: int) -> View:
        """The tensors of a picture; pixels in the precision that the recipe computes in, as autocast makes them."""
        backbone: Any = self.engine.backbone
        pixels, grid_thw = backbone.pixels(picture, self.budget_of(tokens))
        pixels = pixels.to(getattr(torch, self.recipe.precision))
        return View(pixels, grid_thw, backbone.grid(picture.size, self.budget_of(tokens)))

    def picture(self, question: Question, style: str, tokens: int) -> PIL.Image.Image:
        """The picture with its region marked, or, unmarked, as it is; unmarked ones may come resized from memory."""
        if style in ("none", "text"):
            return self._plain(question.picture, tokens)
        whole = self._open(question.picture)
        return draw(whole, question.box, style, tokens=self.budget_of(tokens).max_tokens)  # type: ignore[arg-type]

    def part(self, questions: Sequence[Question], row: Row) -> tuple[PIL.Image.Image, Box]:
        """What a row's window shows of a picture, and where it lies: around the region of one of the questions.

        Args:
            questions: about one picture; at least one of them with a region.
            row: sharpness, size and place.
        """
        rng = random.Random(row.place)
        whole = self._open(questions[0].picture)
        cell_area = self.engine.backbone.token_px**2
        whole_scale = math.sqrt(self.budget_of(row.tokens).max_tokens * cell_area / (whole.width * whole.height))
        window = window_around(
            rng.choice(regions_of(questions)),
            whole.size,
            row.window * cell_area,
            min(1.0, whole_scale),
            self.recipe.windows,
            rng,
        )
        return whole.crop(window), window

    def size_px(self, path: str) -> tuple[int, int]:
        """(width, height) of a picture, upright."""
        if path not in self._sizes:
            self._open(path)
        return self._sizes[path]

    def _open(self, path: str) -> PIL.Image.Image:
        """A picture, whose size is remembered."""
        whole = load_image(path).image
        self._sizes[path] = whole.size
        return whole

    def wording(self, question: Question, style: str) -> str:
        """The question's text with the clause of its style and the recipe's instruction."""
        parts = [question.text]
        if self.recipe.clause and style != "none":
            size = self.size_px(question.picture) if style == "text" else (2**31, 2**31)
            parts.append(clause(style, question.box, size))  # type: ignore[arg-type]
        if self.recipe.instruction:
            parts.append(self.recipe.instruction)
        return "\n".join(parts)

    def asked(self, text: str, answer: str) -> Asked:
        """Tokens of a question and its right reply."""
        ids = self._chat.encode(read_conversation(_SOURCE, text))
        backbone = self.engine.backbone
        reply = backbone.tokenizer(wrap(answer, self.recipe.answer_form), add_special_tokens=False)["input_ids"]
        return Asked(tuple(ids), (*reply, backbone.eos_ids[0]))

    def expand(self, ids: Sequence[int], cells: tuple[int, int]) -> list[int]:
        """The prompt with one placeholder for every visual token.

        Raises:
            DataError: not exactly one picture.
        """
        mark = self.engine.backbone.image_token_id
        if sum(token == mark for token in ids) != 1:
            raise DataError("A distilled question must have exactly one picture in its prompt.")
        at = list(ids).index(mark)
        return [*ids[:at], *[mark] * (cells[0] * cells[1]), *ids[at + 1 :]]

    def positions(self, ids: Sequence[int], cells: tuple[int, int]) -> Tensor:
        """(axes, length) positions of an expanded prompt, as the engine gives them."""
        return self.engine.backbone.positions(torch.tensor(list(ids)), [cells])

    def _plain(self, path: str, tokens: int) -> PIL.Image.Image:
        key = (path, tokens)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        whole = self._open(path)
        if not self._room:
            return whole
        small = self._resized(whole, tokens)
        size = small.width * small.height * 3
        while self._kept and self._used + size > self._room:
            _, old = self._kept.popitem(last=False)
            self._used -= old.width * old.height * 3
        if size <= self._room:
            self._kept[key] = small
            self._used += size
        return small

    def _resized(self, picture: PIL.Image.Image, tokens: int) -> PIL.Image.Image:
        """The picture at its view's size, by the backbone's own resampling; the view of either is the same."""
        from PIL import Image

        backbone: Any = self.engine.backbone
        rows, columns = backbone.grid(picture.size, self.budget_of(tokens))
        target = (columns * backbone.token_px, rows * backbone.token_px)
        if picture.size == target:
            return picture
        return picture.resize(target, Image.Resampling(int(backbone.image_processor.resample)))


_SOURCE = object()
"""Stands for a picture where only the words matter."""


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
    fork = _end_of_picture(first, backbone.image_token_id) + len(backbone.image_delimiters[1])
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
