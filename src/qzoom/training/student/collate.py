"""Schedule entries to tensors for the stock model, with the prompts that the engine makes later.

Training and `qzoom ask --zoom never` share every function between the question and the tensors, so a student learns
the prompt that it will get.

The questions about one image are packed into one sequence. Each attends to the image and to itself, and its positions
start where the image ends, so it is trained as if it were alone while the image is encoded once. A question whose
region is marked gets a sequence of its own, since its image is another one.

              image   question 1   question 2          x: may attend
    image        x
    question 1   x         x
    question 2   x                      x
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from qzoom.config import TokenBudget
from qzoom.data.cells import covered_cells
from qzoom.data.overlay import choose_style, clause, draw, has_box
from qzoom.engine.cache import LRUCache
from qzoom.engine.chat import ChatEncoder, read_conversation
from qzoom.engine.request import Options, budget, coarse_budget
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.images.load import load_image
from qzoom.training.losses import IGNORE
from qzoom.training.student.data import ExportedQuestion
from qzoom.training.student.recipe import StudentRecipe
from qzoom.training.student.rewards import wrap
from qzoom.training.student.schedule import ScheduleEntry, box_in_crop, questions_in_crop, random_crop, regions_of
from qzoom.types import Box


@dataclass(frozen=True, slots=True, eq=False)
class ImageTensors:
    """An image as the vision tower takes it."""

    pixels: Tensor  # (patches, values)
    grid_thw: Tensor  # (1, 3) patches in time, height and width
    cells: tuple[int, int]  # (rows, columns) of visual tokens


@dataclass(frozen=True, slots=True, eq=False)
class GrpoPrompt:
    """A prompt ready for the model."""

    view: ImageTensors  # the image
    ids: tuple[int, ...]  # tokens, the image's placeholders expanded
    image_token: int  # id of the placeholder


class Prompter:
    """Makes views and prompts of a student, with the recipe's overlay, clause, instruction and form of the answer."""

    def __init__(self, engine: Engine, recipe: StudentRecipe) -> None:
        self.engine = engine
        self.recipe = recipe
        self._chat = ChatEncoder(engine.backbone)
        self._cache: LRUCache[PIL.Image.Image] = LRUCache(
            int(recipe.cache_gb * 1e9), lambda image: 3 * image.width * image.height
        )
        self._sizes: dict[str, tuple[int, int]] = {}

    def budget_of(self, tokens: int) -> TokenBudget:
        """Limits on the visual tokens of the full view; 0 takes what the engine takes by itself."""
        standard = coarse_budget(self.engine, Options())
        return (budget(tokens, standard) if tokens else None) or standard

    def style_of(self, question: ExportedQuestion, epoch: int, progress: float) -> str:
        """How the region is marked this time; "none" without a box, or when the schedule says so."""
        if question.box is None or not has_box(question.id, epoch, self.recipe.fade.share(progress)):
            return "none"
        return choose_style(question.id, epoch, self.recipe.styles)

    def view(self, picture: PIL.Image.Image, tokens: int) -> ImageTensors:
        """The tensors of an image; pixels in the precision that the recipe computes in, as autocast makes them."""
        backbone: Any = self.engine.backbone
        pixels, grid_thw = backbone.pixels(picture, self.budget_of(tokens))
        pixels = pixels.to(getattr(torch, self.recipe.precision))
        return ImageTensors(pixels, grid_thw, backbone.grid(picture.size, self.budget_of(tokens)))

    def picture(self, question: ExportedQuestion, style: str, tokens: int) -> PIL.Image.Image:
        """The image with its region marked, or unmarked; unmarked images may come resized from the cache."""
        if style in ("none", "text"):
            return self._plain(question.picture, tokens)
        whole = self._open(question.picture)
        return draw(whole, question.box, style, tokens=self.budget_of(tokens).max_tokens)  # type: ignore[arg-type]

    def random_crop(self, questions: Sequence[ExportedQuestion], entry: ScheduleEntry) -> tuple[PIL.Image.Image, Box]:
        """An entry's random crop around the region of one of the questions about an image, and its box."""
        rng = random.Random(entry.crop_seed)
        whole = self._open(questions[0].picture)
        cell_area = self.engine.backbone.token_px**2
        whole_scale = math.sqrt(self.budget_of(entry.tokens).max_tokens * cell_area / (whole.width * whole.height))
        scales = (min(1.0, whole_scale), self.recipe.random_crops.scale)
        box = random_crop(rng.choice(regions_of(questions)), whole.size, entry.crop_tokens * cell_area, scales, rng)
        return whole.crop(box), box

    def size_px(self, path: str) -> tuple[int, int]:
        """(width, height) of an image, upright."""
        if path not in self._sizes:
            self._open(path)
        return self._sizes[path]

    def _open(self, path: str) -> PIL.Image.Image:
        """An image, whose size is remembered."""
        whole = load_image(path).image
        self._sizes[path] = whole.size
        return whole

    def wording(self, question: ExportedQuestion, style: str) -> str:
        """The question's text with the clause of its style and the recipe's instruction."""
        parts = [question.text]
        if self.recipe.clause and style != "none":
            size = self.size_px(question.picture) if style == "text" else (2**31, 2**31)
            parts.append(clause(style, question.box, size))  # type: ignore[arg-type]
        if self.recipe.instruction:
            parts.append(self.recipe.instruction)
        return "\n".join(parts)

    def tokenize(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt up to the assistant's header, with one placeholder for the image, and of its right
        reply, the end token last."""
        ids = self._chat.encode(read_conversation(_SOURCE, text))
        backbone = self.engine.backbone
        reply = backbone.tokenizer(wrap(answer, self.recipe.answer_form), add_special_tokens=False)["input_ids"]
        return ids, [*reply, backbone.eos_ids[0]]

    def expand(self, ids: Sequence[int], cells: tuple[int, int]) -> list[int]:
        """The prompt with one placeholder for every visual token (DataError: not exactly one image)."""
        mark = self.engine.backbone.image_token_id
        if sum(token == mark for token in ids) != 1:
            raise DataError("A distilled question must have exactly one image in its prompt.")
        at = list(ids).index(mark)
        return [*ids[:at], *[mark] * (cells[0] * cells[1]), *ids[at + 1 :]]

    def _plain(self, path: str, tokens: int) -> PIL.Image.Image:
        key = f"{tokens} {path}".encode()
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        whole = self._open(path)
        if not self._cache.max_bytes:
            return whole
        small = self.engine.backbone.resize(whole, self.budget_of(tokens))  # its view is the same
        self._cache.put(key, small)
        return small


_SOURCE = object()
"""Stands for an image where only the words matter."""


DrawSample = Callable[[int], "tuple[PIL.Image.Image, list[tuple[str, str]]]"]
"""From a seed to an image and its (question, answer) pairs."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """An image with its questions."""

    ids: Tensor  # (length,) tokens
    positions: Tensor  # (axes, length)
    segment: Tensor  # (length,) 0 for the image and what stands before it, 1 and up for the questions
    labels: Tensor  # (length,) the token itself where it belongs to a reply, else -100
    view: ImageTensors  # the image
    # (questions, length) true at the visual tokens that the question's region touches; None for none
    regions: Tensor | None = None


class Collator:
    """From numbers of schedule entries to tensors: batches for supervised training, prompts and right replies for GRPO.

    Args:
        schedule: of the run; one question per entry for GRPO.
        rehearsal: draws rehearsal data.
        masked: give every batch a 4-D mask, for attention that needs one.
        regions: give every batch its questions' regions, see `PackedSequence`.
    """

    def __init__(
        self,
        prompter: Prompter,
        questions: Sequence[ExportedQuestion],
        schedule: Sequence[ScheduleEntry],
        rehearsal: DrawSample | None = None,
        *,
        masked: bool = False,
        regions: bool = False,
    ) -> None:
        self.prompter = prompter
        self._questions, self._schedule, self._rehearsal = questions, schedule, rehearsal
        self._masked, self._regions = masked, regions

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        """The batch of these rows of the data set, each {"row": number}."""
        sequences = [sequence for row in rows for sequence in self.sequences(self._schedule[row["row"]])]
        pad = int(self.prompter.engine.backbone.tokenizer.pad_token_id)
        return pad_sequences(sequences, pad, masked=self._masked)

    def reference(self, number: int) -> ExportedQuestion:
        """What a right reply to the question of an entry says."""
        entry = self._schedule[number]
        if entry.rehearsal < 0:
            return self._questions[entry.questions[0]]
        _, ((text, answer), *_) = self._draw(entry.rehearsal)
        return ExportedQuestion("", "", text, answer)

    def prompt(self, number: int) -> GrpoPrompt:
        """The prompt of an entry."""
        entry, prompter = self._schedule[number], self.prompter
        if entry.rehearsal >= 0:
            image, ((text, answer), *_) = self._draw(entry.rehearsal)
        else:
            question = self._questions[entry.questions[0]]
            style = prompter.style_of(question, entry.epoch, entry.progress)
            image, answer = prompter.picture(question, style, entry.tokens), question.answer
            text = prompter.wording(question, style)
        view = prompter.view(image, entry.tokens)
        ids = prompter.expand(prompter.tokenize(text, answer)[0], view.cells)
        return GrpoPrompt(view, tuple(ids), prompter.engine.backbone.image_token_id)

    def _draw(self, seed: int) -> tuple[PIL.Image.Image, list[tuple[str, str]]]:
        if self._rehearsal is None:
            raise ValueError("A rehearsal entry needs something that draws.")
        return self._rehearsal(seed)

    def sequences(self, entry: ScheduleEntry) -> list[PackedSequence]:
        """An entry's sequences: one for all unmarked questions, one for every marked one."""
        prompter = self.prompter
        if entry.rehearsal >= 0:
            image, pairs = self._draw(entry.rehearsal)
            questions = [prompter.tokenize(*pair) for pair in pairs]
            return [pack_questions(prompter, prompter.view(image, entry.tokens), questions)]
        cropped = self._cropped(entry) if entry.crop_tokens else None
        if cropped is not None:
            return [cropped]
        alone: list[tuple[ExportedQuestion, str]] = []
        shared: list[tuple[ExportedQuestion, str]] = []
        for question in self._of(entry):
            style = prompter.style_of(question, entry.epoch, entry.progress)
            (shared if style in ("none", "text") else alone).append((question, style))
        out = []
        for group in ([shared] if shared else []) + [[pair] for pair in alone]:
            first, style = group[0]
            view = prompter.view(prompter.picture(first, style, entry.tokens), entry.tokens)
            questions = [prompter.tokenize(prompter.wording(q, s), q.answer) for q, s in group]
            sequence = pack_questions(prompter, view, questions)
            out.append(self._with_regions(sequence, [q.box for q, _ in group], prompter.size_px(first.picture)))
        return out

    def _cropped(self, entry: ScheduleEntry) -> PackedSequence | None:
        """A random crop with the questions that can be asked about it, unmarked; None if there are none."""
        prompter, group = self.prompter, self._of(entry)
        if not regions_of(group):
            return None
        image, box = prompter.random_crop(group, entry)
        inside = questions_in_crop(group, box, entry.crop_seed)
        if not inside:
            return None
        questions = [prompter.tokenize(prompter.wording(q, "none"), q.answer) for q in inside]
        sequence = pack_questions(prompter, prompter.view(image, entry.crop_tokens), questions)
        return self._with_regions(sequence, [box_in_crop(q.box, box) for q in inside], image.size)

    def _of(self, entry: ScheduleEntry) -> list[ExportedQuestion]:
        return [self._questions[index] for index in entry.questions]

    def _with_regions(
        self, sequence: PackedSequence, boxes: Sequence[Box | None], size_px: tuple[int, int]
    ) -> PackedSequence:
        """The sequence with the visual tokens of its questions' regions, if asked for; none where there is no box."""
        if not self._regions:
            return sequence
        visual = (sequence.ids == self.prompter.engine.backbone.image_token_id).nonzero().squeeze(1)
        regions = torch.zeros(len(boxes), len(sequence.ids), dtype=torch.bool)
        for index, box in enumerate(boxes):
            if box is not None:
                touched = covered_cells([box], size_px, sequence.view.cells) > 0
                regions[index, visual] = torch.from_numpy(touched.ravel())
        return dataclasses.replace(sequence, regions=regions)


def pack_questions(
    prompter: Prompter, view: ImageTensors, questions: Sequence[tuple[list[int], list[int]]]
) -> PackedSequence:
    """One sequence of an image and its tokenised questions, which share their prompt up to the image's end."""
    backbone = prompter.engine.backbone
    first = prompter.expand(questions[0][0], view.cells)
    fork = _end_of_image(first, backbone.image_token_id) + len(backbone.image_delimiters[1])
    prefix = first[:fork]
    stem = backbone.positions(torch.tensor(prefix), [view.cells])
    ids, labels, segment, positions = list(prefix), [IGNORE] * fork, [0] * fork, [stem]
    begin = int(stem.max()) + 1
    for number, (asked, reply) in enumerate(questions, start=1):
        prompt = prompter.expand(asked, view.cells)
        if prompt[:fork] != prefix:
            raise ValueError("Questions of one sequence must share what stands before the image's end.")
        tail = [*prompt[fork:], *reply]
        ids += tail
        labels += [IGNORE] * (len(prompt) - fork) + reply
        segment += [number] * len(tail)
        positions.append(torch.arange(begin, begin + len(tail)).expand(stem.shape[0], -1))
    return PackedSequence(
        torch.tensor(ids), torch.cat(positions, dim=1), torch.tensor(segment), torch.tensor(labels), view
    )


def pad_sequences(sequences: Sequence[PackedSequence], pad: int, *, masked: bool = False) -> dict[str, Any]:
    """A batch (B, S) padded on the right, with a 4-D mask (B, 1, S, S), true = may attend.

    A batch of single questions gets the usual 2-D mask unless `masked`.
    """
    length = max(len(s.ids) for s in sequences)
    count = len(sequences)
    ids = torch.full((count, length), pad)
    labels = torch.full((count, length), IGNORE)
    segment = torch.full((count, length), -1)
    positions = torch.zeros(sequences[0].positions.shape[0], count, length, dtype=torch.long)
    for index, sequence in enumerate(sequences):
        size = len(sequence.ids)
        ids[index, :size] = sequence.ids
        labels[index, :size] = sequence.labels
        segment[index, :size] = sequence.segment
        positions[:, index, :size] = sequence.positions
    single = int(segment.max()) <= 1 and not masked
    return _padded_regions(sequences, length) | {
        "input_ids": ids,
        "attention_mask": (segment >= 0).long() if single else _packed_mask(segment),
        "position_ids": positions,
        "labels": labels,
        "pixel_values": torch.cat([s.view.pixels for s in sequences]),
        "image_grid_thw": torch.cat([s.view.grid_thw for s in sequences]),
    }


def _padded_regions(sequences: Sequence[PackedSequence], length: int) -> dict[str, Tensor]:
    """Regions (B, most questions, S) and segments (B, S) where any sequence has regions; drawn pictures have none."""
    if all(s.regions is None for s in sequences):
        return {}
    most = max(int(s.segment.max()) for s in sequences)
    regions = torch.zeros(len(sequences), most, length, dtype=torch.bool)
    segment = torch.full((len(sequences), length), -1)
    for index, sequence in enumerate(sequences):
        segment[index, : len(sequence.segment)] = sequence.segment
        if sequence.regions is not None:
            count, size = sequence.regions.shape
            regions[index, :count, :size] = sequence.regions
    return {"regions": regions, "segment": segment}


def _packed_mask(segment: Tensor) -> Tensor:
    """Causal, within the image and the own question; padding attends to itself, so that no row is empty."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    return ((same | (segment == 0)[:, None, :]) & causal)[:, None]


def _end_of_image(ids: Sequence[int], mark: int) -> int:
    return len(ids) - list(reversed(ids)).index(mark)
