"""A question and its picture as the model is asked later: the engine's own words, tokens, positions and pixels.

Training and `qzoom ask --zoom never` share every function between the question and the tensors, so a student learns
the prompt that it will get.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qzoom.distill.overlay import choose_style, clause, draw, has_box
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.fit import coarse_budget
from qzoom.engine.request import Options, budget
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.images.load import load_image
from qzoom.training.distill.data import Question
from qzoom.training.distill.parse import wrap
from qzoom.training.distill.recipe import DistillRecipe
from qzoom.training.distill.windows import regions_of, window_around
from qzoom.types import Box

if TYPE_CHECKING:
    import PIL.Image

    from qzoom.config import TokenBudget
    from qzoom.training.distill.order import Row

__all__ = ["Asked", "Prompter", "View"]


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
        cell_area = self.engine.backbone.cell_px**2
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
        target = (columns * backbone.cell_px, rows * backbone.cell_px)
        if picture.size == target:
            return picture
        return picture.resize(target, Image.Resampling(int(backbone.image_processor.resample)))


_SOURCE = object()
"""Stands for a picture where only the words matter."""
