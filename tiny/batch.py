"""From examples to tensors: one sequence holds a picture (or several, e.g. a coarse view and a crop) and questions.

Every question of a sequence is a branch of its own: it sees the pictures and itself, never another question, and its
positions start where the pictures end. So each question is trained exactly as if it were the only one, and the
pictures are encoded once. The result feeds the stock model: 4-D mask, 3-D positions. `split_pool` sorts the examples
of a step by length and cuts them into batches of about equally many positions, so that little is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiny.model import PATCH_PX, TOKEN_PX
from tiny.render_views import patchify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GLYPHS = "".join(chr(code) for code in range(33, 127))
SLOT_W, SLOT_H = 4, 16
"""Pixels of a slot: every visual token is divided into 2 rows of 8 slots, each of which may name one character."""
SLOTS = (TOKEN_PX // SLOT_W) * (TOKEN_PX // SLOT_H)
IGNORE = -100
_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_LEAST_SHARE = 6


@dataclass(frozen=True, slots=True, eq=False)
class Glyphs:
    """Printed characters of one view, in the view's pixels: centres (n, 2), heights (n,) and classes (n,)."""

    centers_px: np.ndarray
    heights_px: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class ReadLine:
    """A printed line of one view whose characters' places are not known: middle of its left and of its right edge
    (view pixels), its text without spaces, and whether capitals stand for small letters too."""

    left_px: tuple[float, float]
    right_px: tuple[float, float]
    text: str
    capitals: bool


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """Objects of one view: boxes (n, 4), xyxy in the view's pixels, and colour and shape numbers (n, 2) from 1 on."""

    boxes_px: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A question of an example. `points` has one row per answer character and one pair per view, (chars, views, 2):
    where that character is printed in that view, pixels, NaN where it is not. `asked_points` is the same of the
    question's characters."""

    question: str
    answer: str
    points: np.ndarray | None = None
    asked_points: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Views (uint8 RGB, sides multiples of 32) with their printed characters, and the questions about them; `objects`
    of every view where the picture's objects are known."""

    task: str
    views: tuple[np.ndarray, ...]
    glyphs: tuple[Glyphs | None, ...]
    queries: tuple[Query, ...]
    objects: tuple[Objects, ...] | None = None
    read_lines: tuple[tuple[ReadLine, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Visual tokens of all views."""
        return sum(view.shape[0] * view.shape[1] for view in self.views) // TOKEN_PX**2


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tensors of B sequences of S positions. `labels` (B, S): the next token where it belongs to an answer, else -100.
    `branch` (B, S): question number at labelled positions. `read_target`, `locate_target` (B, S): the sequence position
    of the visual token that holds the next answer character in the last and in the first view that show it, else -100.
    `match_target` (B, S): that of the token that shows the question's own character in the last view, else -100.
    `glyph_target` (visual tokens, 16): character classes, 0 for empty, -100 unknown. `object_target` (visual tokens,
    2): colour and shape of the object there, 0 for none, -100 unknown. `line_frames` (lines, frames): slot numbers
    along each read line, counted over all visual tokens, -1 past its end; `line_text` (lines, characters): classes, 0
    past the end; `line_capitals` (lines,)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    branch: torch.Tensor
    read_target: torch.Tensor
    locate_target: torch.Tensor
    match_target: torch.Tensor
    pixels: torch.Tensor
    grid_thw: torch.Tensor
    glyph_target: torch.Tensor
    object_target: torch.Tensor
    line_frames: torch.Tensor
    line_text: torch.Tensor
    line_capitals: torch.Tensor
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


def split_pool(examples: list[Example], tokenizer: PreTrainedTokenizerFast, positions: int) -> list[list[Example]]:
    """The examples in groups that each fill about `positions` positions once padded (an example longer than that makes
    a group of its own) and whose lengths differ little. Views alone, without questions, are kept apart: they need no
    decoder."""
    groups: list[list[Example]] = []
    for asked in (False, True):
        chosen = [example for example in examples if bool(example.queries) == asked]
        lengths = [_length(example, tokenizer) for example in chosen]
        shortest = 0
        for index in np.argsort(lengths, kind="stable"):
            example, length = chosen[index], (lengths[index] + 7) // 8 * 8
            size = len(groups[-1]) if groups else 0
            other = not size or bool(groups[-1][0].queries) != asked
            padded = length > 1.2 * shortest and size * shortest > positions // _LEAST_SHARE
            if other or padded or (size + 1) * length > positions:
                groups.append([])
                shortest = length
            groups[-1].append(example)
    return [sorted(group, key=lambda e: e.views[0].shape) for group in groups]


def _length(example: Example, tokenizer: PreTrainedTokenizerFast) -> int:
    """Positions of an example: as many as `_Row` makes of it; for views alone about their cost in positions."""
    if not example.queries:
        return example.tokens * 3 // 2 + 1
    template = len(_encode(tokenizer, _USER)[0]), len(_encode(tokenizer, _ASSISTANT)[0])
    texts = [len(_encode(tokenizer, q.question)[0]) + len(_encode(tokenizer, q.answer)[0]) for q in example.queries]
    return template[0] + example.tokens + 2 * len(example.views) + sum(texts) + (template[1] + 1) * len(texts)


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """The batch of these examples; sequences are padded on the right to the longest."""
    rows = [_Row(example, tokenizer) for example in examples]
    length = (max(len(row.ids) for row in rows) + 7) // 8 * 8
    count = len(rows)
    ids = np.full((count, length), int(tokenizer.pad_token_id), dtype=np.int64)
    positions = np.zeros((3, count, length), dtype=np.int64)
    marks = np.full((count, length), -1, dtype=np.int64)
    names = ("labels", "branch", "read", "locate", "match")
    extra = {name: np.full((count, length), IGNORE, dtype=np.int64) for name in names}
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = row.ids
        positions[:, index, :size] = np.array(row.positions, dtype=np.int64).T
        marks[index, :size] = row.marks
        for name in names:
            extra[name][index, :size] = getattr(row, name)
    views = [view for example in examples for view in example.views]
    glyphs = [
        _glyph_slots(view, glyph)
        for example in examples
        for view, glyph in zip(example.views, example.glyphs, strict=True)
    ]
    frames, text, capitals = _line_tensors(examples)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        mask=_branch_mask(torch.from_numpy(marks)),
        labels=torch.from_numpy(extra["labels"]),
        branch=torch.from_numpy(extra["branch"]),
        read_target=torch.from_numpy(extra["read"]),
        locate_target=torch.from_numpy(extra["locate"]),
        match_target=torch.from_numpy(extra["match"]),
        pixels=torch.from_numpy(np.concatenate([patchify(view) for view in views])),
        grid_thw=torch.tensor([(1, view.shape[0] // PATCH_PX, view.shape[1] // PATCH_PX) for view in views]),
        glyph_target=torch.from_numpy(np.concatenate(glyphs)),
        object_target=torch.from_numpy(np.concatenate([_object_cells(example) for example in examples])),
        line_frames=frames,
        line_text=text,
        line_capitals=capitals,
        tasks=tuple(example.task for example in examples),
    )


def _line_tensors(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames, classes and the capitals flag of all read lines but those that share their slots with another line, as
    rows closer than a slot is high do, or have fewer slots than characters."""
    frames: list[np.ndarray] = []
    texts: list[np.ndarray] = []
    capitals: list[bool] = []
    start = 0
    for example in examples:
        for number, view in enumerate(example.views):
            lines = example.read_lines[number] if example.read_lines else ()
            paths = [_line_path(line, view.shape) for line in lines]
            uses = np.bincount(np.concatenate(paths)) if paths else np.zeros(0)
            for line, path in zip(lines, paths, strict=True):
                classes = glyph_classes(line.text)
                repeats = int((classes[1:] == classes[:-1]).sum())
                alone = bool(len(path)) and (uses[path] > 1).mean() < 0.15
                if alone and len(classes) and len(path) >= len(classes) + repeats:
                    frames.append(path + start * SLOTS)
                    texts.append(classes)
                    capitals.append(line.capitals)
            start += view.shape[0] * view.shape[1] // TOKEN_PX**2
    return _padded(frames, -1), _padded(texts, 0), torch.tensor(capitals, dtype=torch.bool)


def _padded(rows: list[np.ndarray], fill: int) -> torch.Tensor:
    out = np.full((len(rows), max((len(row) for row in rows), default=0)), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def _line_path(line: ReadLine, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of the slots along a line in its view, one a column, from just left of it to just right of it."""
    first = max(0, int(line.left_px[0] // SLOT_W) - 1)
    last = min(shape[1] // SLOT_W - 1, int(line.right_px[0] // SLOT_W) + 1)
    columns = np.arange(first, last + 1)
    run = max(1e-3, line.right_px[0] - line.left_px[0])
    share = np.clip(((columns + 0.5) * SLOT_W - line.left_px[0]) / run, 0, 1)
    y = line.left_px[1] + share * (line.right_px[1] - line.left_px[1])
    rows = np.clip((y // SLOT_H).astype(np.int64), 0, shape[0] // SLOT_H - 1)
    across, down = TOKEN_PX // SLOT_W, TOKEN_PX // SLOT_H
    token = rows // down * (shape[1] // TOKEN_PX) + columns // across
    return token * SLOTS + rows % down * across + columns % across


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
        self.match: list[int] = []
        self._next = 0
        special = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in _SPECIALS}
        self._text(_encode(tokenizer, _USER)[0], 0)
        starts: list[tuple[int, int]] = []
        for view in example.views:
            self._text((special["<|vision_start|>"],), 0)
            starts.append((len(self.ids), view.shape[1] // TOKEN_PX))
            self._picture(view.shape[0] // TOKEN_PX, view.shape[1] // TOKEN_PX, special["<|image_pad|>"])
            self._text((special["<|vision_end|>"],), 0)
        fork = self._next
        for number, query in enumerate(example.queries):
            self._next = fork
            question, begins = _encode(tokenizer, query.question)
            at = len(self.ids)
            self._text(question, number + 1)
            if query.asked_points is not None:
                for offset, begin in enumerate(begins):
                    shown = _cells(query.asked_points[begin], starts)
                    self.match[at + offset] = shown[-1] if shown else IGNORE
            self._text(_encode(tokenizer, _ASSISTANT)[0], number + 1)
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
        for values in (self.labels, self.branch, self.read, self.locate, self.match):
            values.append(IGNORE)

    def _aim(self, at: int, points: np.ndarray, starts: list[tuple[int, int]]) -> None:
        """Set the pointing targets of one position from its character's place in every view."""
        known = _cells(points, starts)
        if known:
            self.locate[at] = known[0]
            self.read[at] = known[-1]


def _cells(points: np.ndarray, starts: list[tuple[int, int]]) -> list[int]:
    """Sequence positions of the visual tokens that hold a character, view by view; views that do not show it (NaN) have
    none. `starts`: of every view its first position and its tokens in a row."""
    return [
        start + int(y // TOKEN_PX) * wide + int(x // TOKEN_PX)
        for (start, wide), (x, y) in zip(starts, points, strict=True)
        if x == x
    ]


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
    """Character classes for the slots of every visual token, (tokens, 16).

    A character is named by the slot that holds its centre (where several share one, the nearest); the slots beside it
    are unknown, since a centre is not known to the pixel; so are slots under text too small to read. Without glyphs
    everything is unknown.
    """
    high, wide = view.shape[0] // SLOT_H, view.shape[1] // SLOT_W
    if glyphs is None:
        return np.full((high * wide // SLOTS, SLOTS), IGNORE, dtype=np.int64)
    slots = np.zeros((high, wide + 2), dtype=np.int64)
    x, y = glyphs.centers_px[:, 0], glyphs.centers_px[:, 1]
    inside = (x >= 0) & (y >= 0) & (x < view.shape[1]) & (y < view.shape[0]) & (glyphs.classes > 0)
    x, y, kinds, sizes = x[inside], y[inside], glyphs.classes[inside], glyphs.heights_px[inside]
    rows, columns = (y // SLOT_H).astype(np.int64), (x // SLOT_W).astype(np.int64) + 1
    slots[rows, columns - 1] = IGNORE
    slots[rows, columns + 1] = IGNORE
    distance = np.hypot(x - ((columns - 1) * SLOT_W + SLOT_W / 2), (y - (rows * SLOT_H + SLOT_H / 2)) / 2)
    order = np.argsort(-distance, kind="stable")
    slots[rows[order], columns[order]] = np.where(sizes < min_height_px, IGNORE, kinds)[order]
    across, down = TOKEN_PX // SLOT_W, TOKEN_PX // SLOT_H
    return slots[:, 1:-1].reshape(high // down, down, wide // across, across).transpose(0, 2, 1, 3).reshape(-1, SLOTS)
