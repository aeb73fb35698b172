"""From examples to tensors: one sequence holds a picture (or a coarse picture and a crop) and several questions.

Every question of a sequence is a branch of its own: it sees the pictures and itself, never another question, and its
positions start where the pictures end. So each question is trained exactly as if it were the only one, and the
pictures are paid for once. The result feeds the stock model: 4-D mask, 3-D positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from qzoom.training.patches import patchify
from qzoom.training.tiny import TOKEN_PX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Batch", "Example", "Glyphs", "Objects", "Query", "collate", "glyph_classes"]

GLYPHS = "".join(chr(code) for code in range(33, 127))
SLOTS = 8
IGNORE = -100


@dataclass(frozen=True, slots=True, eq=False)
class Glyphs:
    """Printed characters of one view, in the view's pixels: centres (n, 2), heights (n,) and classes (n,)."""

    centers_px: np.ndarray
    heights_px: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Objects of one view: boxes (n, 4), xyxy in the view's pixels, and colour and shape numbers (n, 2) from 1 on."""

    boxes_px: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A question of an example. `points` has one row per answer character and one pair per view, (chars, views, 2):
    where that character is printed in that view, pixels, NaN where it is not."""

    question: str
    answer: str
    points: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Views (uint8 RGB, sides multiples of 32) with their printed characters, and the questions about them; `objects`
    of every view where the picture's objects are known."""

    task: str
    views: tuple[np.ndarray, ...]
    glyphs: tuple[Glyphs | None, ...]
    queries: tuple[Query, ...]
    objects: tuple[Objects, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tensors of B sequences of S positions. `labels` (B, S): the next token where it belongs to an answer, else -100.
    `branch` (B, S): question number at labelled positions. `read_target`, `locate_target` (B, S): the sequence position
    of the visual token that holds the next answer character in the finest and in the first view, else -100.
    `glyph_target` (visual tokens, 8): character classes, 0 for empty, -100 unknown. `object_target` (visual tokens, 2):
    colour and shape of the object there, 0 for none, -100 unknown."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    branch: torch.Tensor
    read_target: torch.Tensor
    locate_target: torch.Tensor
    pixels: torch.Tensor
    grid_thw: torch.Tensor
    glyph_target: torch.Tensor
    object_target: torch.Tensor
    tasks: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        if device.type == "cpu":
            return self
        moved = {
            entry.name: value.to(device, non_blocking=True)
            for entry in fields(self)
            if isinstance(value := getattr(self, entry.name), torch.Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]


def glyph_classes(text: str) -> np.ndarray:
    """Class of every character: 1.. for printable ASCII, 0 for the rest."""
    return np.array([ord(char) - 32 if 33 <= ord(char) < 127 else 0 for char in text], dtype=np.int64)


@lru_cache(maxsize=200_000)
def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a text and the character at which each begins."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return tuple(encoded["input_ids"]), tuple(start for start, _ in encoded["offset_mapping"])


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of these examples; sequences are padded on the right to the longest."""
    rows = [_Row(example, tokenizer) for example in examples]
    length = max(len(row.ids) for row in rows)
    count = len(rows)
    pad = int(tokenizer.pad_token_id)
    ids = np.full((count, length), pad, dtype=np.int64)
    positions = np.zeros((3, count, length), dtype=np.int64)
    marks = np.full((count, length), -1, dtype=np.int64)
    extra = {name: np.full((count, length), IGNORE, dtype=np.int64) for name in ("labels", "branch", "read", "locate")}
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = row.ids
        positions[:, index, :size] = np.array(row.positions, dtype=np.int64).T
        marks[index, :size] = row.marks
        for name, values in (
            ("labels", row.labels),
            ("branch", row.branch),
            ("read", row.read),
            ("locate", row.locate),
        ):
            extra[name][index, :size] = values
    views = [view for example in examples for view in example.views]
    grid = [(1, view.shape[0] // 16, view.shape[1] // 16) for view in views]
    glyphs = [
        _glyph_slots(view, glyph)
        for example in examples
        for view, glyph in zip(example.views, example.glyphs, strict=True)
    ]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        mask=_branch_mask(torch.from_numpy(marks)),
        labels=torch.from_numpy(extra["labels"]),
        branch=torch.from_numpy(extra["branch"]),
        read_target=torch.from_numpy(extra["read"]),
        locate_target=torch.from_numpy(extra["locate"]),
        pixels=torch.from_numpy(np.concatenate([patchify(view) for view in views])),
        grid_thw=torch.tensor(grid),
        glyph_target=torch.from_numpy(np.concatenate(glyphs)),
        object_target=torch.from_numpy(np.concatenate([_object_cells(example) for example in examples])),
        tasks=tuple(example.task for example in examples),
    )


def _branch_mask(marks: torch.Tensor) -> torch.Tensor:
    """Attention mask (B, 1, S, S), true = attend: causal, and only the prefix (mark 0) or the own branch."""
    length = marks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = marks[:, :, None] == marks[:, None, :]
    prefix = (marks == 0)[:, None, :]
    return ((same | prefix) & causal)[:, None]


class _Row:
    """One sequence under construction (plain lists; one entry per position)."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids: list[int] = []
        self.positions: list[tuple[int, int, int]] = []
        self.marks: list[int] = []
        self.labels: list[int] = []
        self.branch: list[int] = []
        self.read: list[int] = []
        self.locate: list[int] = []
        self._next = 0
        special = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in _SPECIALS}  # type: ignore[arg-type]
        self._text(_encode(tokenizer, "<|im_start|>user\n")[0], 0)
        starts: list[tuple[int, int]] = []
        for view in example.views:
            self._text((special["<|vision_start|>"],), 0)
            starts.append((len(self.ids), view.shape[1] // TOKEN_PX))
            self._picture(view.shape[0] // TOKEN_PX, view.shape[1] // TOKEN_PX, special["<|image_pad|>"])
            self._text((special["<|vision_end|>"],), 0)
        fork = self._next
        for number, query in enumerate(example.queries):
            self._next = fork
            self._text(_encode(tokenizer, query.question)[0], number + 1)
            self._text(_encode(tokenizer, "<|im_end|>\n<|im_start|>assistant\n")[0], number + 1)
            answer, begins = _encode(tokenizer, query.answer)
            at = len(self.ids) - 1
            self._text((*answer, special["<|im_end|>"]), number + 1)
            for offset, token in enumerate((*answer, special["<|im_end|>"])):
                self.labels[at + offset] = token
                self.branch[at + offset] = number
                if query.points is not None and offset < len(answer):
                    self._aim(at + offset, query.points[begins[offset]], starts)

    def _text(self, ids: tuple[int, ...], mark: int) -> None:
        for token in ids:
            self._add(token, (self._next,) * 3, mark)
            self._next += 1

    def _picture(self, high: int, wide: int, pad: int) -> None:
        for row in range(high):
            for column in range(wide):
                self._add(pad, (self._next, self._next + row, self._next + column), 0)
        self._next += max(high, wide)

    def _add(self, token: int, position: tuple[int, int, int], mark: int) -> None:
        self.ids.append(token)
        self.positions.append(position)
        self.marks.append(mark)
        for values in (self.labels, self.branch, self.read, self.locate):
            values.append(IGNORE)

    def _aim(self, at: int, points: np.ndarray, starts: list[tuple[int, int]]) -> None:
        """Set the pointing targets of one position from its character's place in every view."""
        cells = [
            start + int(y // TOKEN_PX) * wide + int(x // TOKEN_PX) if x == x else None
            for (start, wide), (x, y) in zip(starts, points, strict=True)
        ]
        if cells[0] is not None:
            self.locate[at] = cells[0]
        known = [cell for cell in cells if cell is not None]
        if known:
            self.read[at] = known[-1]


_SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_end|>")


def _object_cells(example: Example) -> np.ndarray:
    """Colour and shape (visual tokens, 2) of the object whose box covers most of each token's square, 0 where none
    covers a quarter of it (nor lies inside it), -100 where the objects are not known."""
    parts = []
    for number, view in enumerate(example.views):
        high, wide = view.shape[0] // TOKEN_PX, view.shape[1] // TOKEN_PX
        if example.objects is None:
            parts.append(np.full((high * wide, 2), IGNORE, dtype=np.int64))
            continue
        objects = example.objects[number]
        across = _overlap(objects.boxes_px[:, 0], objects.boxes_px[:, 2], wide)
        down = _overlap(objects.boxes_px[:, 1], objects.boxes_px[:, 3], high)
        covered = down[:, :, None] * across[:, None, :]
        area = np.prod(objects.boxes_px[:, 2:] - objects.boxes_px[:, :2], axis=1)
        least = np.minimum(0.25 * TOKEN_PX**2, 0.5 * area)[:, None, None]
        covered = np.concatenate([np.full((1, high, wide), 1e-6), np.where(covered >= least, covered, 0.0)])
        kinds = np.concatenate([np.zeros((1, 2), dtype=np.int64), objects.kinds])
        parts.append(kinds[covered.argmax(axis=0)].reshape(-1, 2))
    return np.concatenate(parts)


def _overlap(low: np.ndarray, high: np.ndarray, count: int) -> np.ndarray:
    """Length (n, count) that each interval shares with each token along one axis, in pixels."""
    edges = np.arange(count + 1) * TOKEN_PX
    shared = np.minimum(high[:, None], edges[None, 1:]) - np.maximum(low[:, None], edges[None, :-1])
    return np.clip(shared, 0, None)


def _glyph_slots(view: np.ndarray, glyphs: Glyphs | None, min_height_px: float = 6.0) -> np.ndarray:
    """Character classes for the eight slots (two rows of four, 16 x 8 px) of every visual token, (tokens, 8).

    Where several characters share a slot the one nearest to its centre counts; slots under text too small to read are
    unknown; without glyphs everything is unknown.
    """
    high, wide = view.shape[0] // 16, view.shape[1] // 8
    if glyphs is None:
        return np.full((high // 2 * (wide // 4), SLOTS), IGNORE, dtype=np.int64)
    slots = np.zeros((high, wide), dtype=np.int64)
    x, y = glyphs.centers_px[:, 0], glyphs.centers_px[:, 1]
    inside = (x >= 0) & (y >= 0) & (x < view.shape[1]) & (y < view.shape[0]) & (glyphs.classes > 0)
    x, y, kinds, sizes = x[inside], y[inside], glyphs.classes[inside], glyphs.heights_px[inside]
    rows, columns = (y // 16).astype(np.int64), (x // 8).astype(np.int64)
    distance = np.hypot(x - (columns * 8 + 4), (y - (rows * 16 + 8)) / 2)
    order = np.argsort(-distance, kind="stable")
    slots[rows[order], columns[order]] = np.where(sizes < min_height_px, IGNORE, kinds)[order]
    merged = slots.reshape(high // 2, 2, wide // 4, 4).transpose(0, 2, 1, 3)
    return merged.reshape(-1, SLOTS)
