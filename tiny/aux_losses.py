"""Forward pass and loss: the language-model loss plus five auxiliary losses (guides) from known text and geometry.

Glyph guide: from every visual token that the vision tower hands to the decoder, a temporary linear layer predicts the
characters printed in its 16 slots (drawn pages, where every character's place is known).
Line guide: the same layer read along a printed line is trained with CTC (connectionist temporal classification) on the
line's transcription, so real lines train the tower although the positions of their characters are unknown.
Object guide: another layer predicts colour and shape of the object that the token shows.
Pointing guide: two attention heads of one decoder layer are trained to attend to the visual token with the next
answer character (one in the first view that shows it, one in the last).
Matching guide: two heads of an earlier layer are trained, on the characters of the question that are printed beside or
above the answer (a row's name, a column's head), to attend to the visual token that shows them.
The guides exist in training only: the exported weights are those of the plain model.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from qzoom.data.synthetic.texts import COLOURS, SHAPES
from qzoom.training.student.attention import attention_logits
from tiny.batch import GLYPHS, IGNORE, SLOTS, Batch

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

OBJECT_KINDS = (len(COLOURS) + 1, len(SHAPES) + 1)
CLASSES = len(GLYPHS) + 1
_SMALL = torch.arange(ord("a") - 32, ord("z") - 31)
_CAPITAL = torch.arange(ord("A") - 32, ord("Z") - 31)


@dataclass(frozen=True, slots=True)
class GuideWeights:
    """Weights of the guides beside the answer loss, and the decoder layers and heads that are taught to point and to
    match."""

    glyph: float = 0.5
    line: float = 0.5
    object: float = 0.5
    pointing: float = 0.3
    pointing_layer: int = 4
    pointing_heads: tuple[int, int] = (0, 2)
    matching: float = 0.0
    matching_layer: int = 2
    matching_heads: tuple[int, int] = (0, 2)

    @property
    def layers(self) -> set[int]:
        """The decoder layers that are taught where to look."""
        return {self.pointing_layer, self.matching_layer} if self.matching else {self.pointing_layer}


@dataclass(frozen=True, slots=True)
class Targets:
    """How many targets of each kind a batch, or a whole step, holds; the losses of a step are means over them."""

    answers: float = 0.0
    glyphs: float = 0.0
    objects: float = 0.0
    characters: float = 0.0
    points: float = 0.0
    matches: float = 0.0

    def __add__(self, other: Targets) -> Targets:
        return Targets(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


def count_targets(batch: Batch) -> Targets:
    """The targets of a batch; empty slots and tokens without an object count a tenth."""
    glyph, kinds = batch.glyph_target, batch.object_target[:, 0]
    return Targets(
        answers=float((batch.labels != IGNORE).sum()),
        glyphs=float((glyph > 0).sum() + 0.1 * (glyph == 0).sum()),
        objects=float((kinds > 0).sum() + 0.1 * (kinds == 0).sum()),
        characters=float((batch.line_text > 0).sum()),
        points=float((batch.locate_target != IGNORE).sum() + (batch.read_target != IGNORE).sum()),
        matches=float(2 * (batch.match_target != IGNORE).sum()),
    )


@dataclass(frozen=True, slots=True)
class PassResult:
    """Outcome of one pass. `loss` carries the gradient; `parts` are the detached losses by name, already divided by the
    step's targets. `exact` (B, questions) is 1 where every answer token is the arg-max given the ones before it, which
    is what greedy decoding would write; -1 where there is no such question. `lines_exact` (lines,): whether the guide
    layer alone reads the line (spaces aside)."""

    loss: torch.Tensor
    parts: dict[str, float]
    exact: torch.Tensor
    lines_exact: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a decoder layer was given: hidden states (B, S, width) and the rotary cosines and sines."""

    layer: nn.Module
    hidden: torch.Tensor
    rotary: Any


class GuidedModel(nn.Module):
    """The stock model with the training-time guides around it; while `shield_tower` is set, the guides learn from the
    vision tower without teaching it."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, weights: GuideWeights | None = None) -> None:
        super().__init__()
        self.model = model
        width = int(model.lm_head.in_features)
        self.glyph_head = nn.Linear(width, SLOTS * CLASSES)
        nn.init.normal_(self.glyph_head.weight, std=width**-0.5)
        nn.init.zeros_(self.glyph_head.bias)
        self.object_head = nn.Linear(width, sum(OBJECT_KINDS))
        nn.init.normal_(self.object_head.weight, std=width**-0.5)
        nn.init.zeros_(self.object_head.bias)
        self.weights = weights or GuideWeights()
        self.shield_tower = False

    def forward(self, batch: Batch, totals: Targets | None = None) -> PassResult:
        """Losses and exact matches of a batch; without questions only the vision tower runs."""
        totals = totals or count_targets(batch)
        core = self.model.model
        vision = core.get_image_features(batch.pixels, batch.grid_thw, return_dict=True)
        visual = torch.cat(list(vision.pooler_output))
        parts, lines_exact = self._vision_losses(visual, batch, totals)
        exact = torch.empty(0, 0, dtype=torch.long)
        asked = batch.labels != IGNORE
        if bool(asked.any()):
            hidden, kept = self._decode(batch, vision)
            logits = self.model.lm_head(hidden[asked]).float()
            answer = F.cross_entropy(logits, batch.labels[asked], reduction="sum") / max(1.0, totals.answers)
            parts["answer"] = answer
            weights = self.weights
            targets = torch.stack([batch.locate_target, batch.read_target])
            pointing = self._attention_loss(kept[weights.pointing_layer], batch, targets, weights.pointing_heads)
            parts["pointing"] = weights.pointing * pointing / max(1.0, totals.points)
            if weights.matching:
                targets = batch.match_target.expand(2, -1, -1)
                matching = self._attention_loss(kept[weights.matching_layer], batch, targets, weights.matching_heads)
                parts["matching"] = weights.matching * matching / max(1.0, totals.matches)
            exact = _exact(logits.argmax(-1), batch, asked)
        loss = torch.stack(list(parts.values())).sum()
        return PassResult(loss, {name: float(part.detach()) for name, part in parts.items()}, exact, lines_exact)

    def _decode(self, batch: Batch, vision: Any) -> tuple[torch.Tensor, dict[int, LayerInput]]:
        """Last hidden states (B, S, width), and what went into the layers that are taught where to look."""
        kept: dict[int, LayerInput] = {}

        def keep(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            kept[number] = LayerInput(module, hidden, kwargs["position_embeddings"])

        core = self.model.model
        with contextlib.ExitStack() as hooks:
            for number in self.weights.layers:
                layer = core.language_model.layers[number]
                handle = layer.register_forward_pre_hook(functools.partial(keep, number), with_kwargs=True)
                hooks.callback(handle.remove)
            hidden = core(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                mm_encoder_outputs={"image": vision},
                use_cache=False,
            ).last_hidden_state
        return hidden, kept

    def _vision_losses(
        self, visual: torch.Tensor, batch: Batch, totals: Targets
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        visual = visual.detach() if self.shield_tower else visual
        slots = self.glyph_head(visual).view(-1, CLASSES).float()
        glyph = self._glyph_loss(slots, batch.glyph_target.view(-1)) / max(1.0, totals.glyphs)
        objects = self._object_loss(visual, batch.object_target) / max(1.0, totals.objects)
        line, exact = line_loss(slots, batch)
        line = line / max(1.0, totals.characters)
        weights = self.weights
        return {"glyph": weights.glyph * glyph, "object": weights.object * objects, "line": weights.line * line}, exact

    def _object_loss(self, visual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of colour and of shape, tokens without an object weighted a tenth."""
        known = target[:, 0] != IGNORE
        total = visual.sum() * 0.0
        if not bool(known.any()):
            return total.float()
        target = target[known]
        weight = torch.where(target[:, 0] > 0, 1.0, 0.1)
        for kind, logits in enumerate(self.object_head(visual[known]).float().split(OBJECT_KINDS, dim=-1)):
            total = total + (F.cross_entropy(logits, target[:, kind], reduction="none") * weight).sum()
        return total

    @staticmethod
    def _glyph_loss(slots: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over printed slots plus a tenth of that over empty ones."""
        known = target != IGNORE
        each = F.cross_entropy(slots[known], target[known], reduction="none")
        return (each * torch.where(target[known] > 0, 1.0, 0.1)).sum()

    @staticmethod
    def _attention_loss(taken: LayerInput, batch: Batch, targets: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
        """Summed cross-entropy of two heads' attention against the visual tokens to look at; `targets` (2, B, S) are
        the heads' sequence positions, -100 where nothing is asked of a position."""
        rows, places = (targets[1] != IGNORE).nonzero(as_tuple=True)
        if not len(rows):
            return taken.hidden.sum().float() * 0.0
        logits = attention_logits(taken.layer, taken.hidden, taken.rotary, rows, places, heads=heads).float()
        logits = logits.masked_fill(~batch.mask[rows, 0, places][:, None], float("-inf"))
        return F.cross_entropy(
            logits.transpose(0, 1).flatten(0, 1),
            targets[:, rows, places].flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )


def line_loss(slots: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """CTC loss summed over all lines, and which of them the best path reads exactly.

    `slots` (all slots, classes) are the guide layer's logits. Where a line was transcribed in capitals, a small letter
    counts as its capital.
    """
    if not len(batch.line_frames):
        return slots.sum() * 0.0, torch.empty(0, dtype=torch.bool)
    inside = batch.line_frames >= 0
    logits = F.log_softmax(slots[batch.line_frames.clamp(min=0)], dim=-1)  # (lines, frames, classes)
    small, capital = _SMALL.to(slots.device), _CAPITAL.to(slots.device)
    folded = logits.index_copy(-1, capital, torch.logaddexp(logits[..., capital], logits[..., small]))
    folded = folded.index_fill(-1, small, -1e4)
    logits = torch.where(batch.line_capitals[:, None, None], folded, logits)
    frames, characters = inside.sum(1), (batch.line_text > 0).sum(1)
    loss = F.ctc_loss(
        logits.transpose(0, 1), batch.line_text, frames, characters, blank=0, reduction="sum", zero_infinity=True
    )
    return loss, _best_path_exact(logits.detach().argmax(-1).masked_fill(~inside, 0), batch.line_text)


def _best_path_exact(path: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Whether each best path (lines, frames), repeats merged and blanks dropped, spells its text (lines, chars)."""
    before = F.pad(path, (1, 0))[:, :-1]
    kept = (path != 0) & (path != before)
    place = kept.cumsum(1) - 1
    room = max(text.shape[1], path.shape[1])
    read = torch.zeros(len(path), room + 1, dtype=path.dtype, device=path.device)
    read.scatter_(1, torch.where(kept, place, room), torch.where(kept, path, 0))
    return (read[:, :room] == F.pad(text, (0, room - text.shape[1]))).all(1)


def _exact(predicted: torch.Tensor, batch: Batch, asked: torch.Tensor) -> torch.Tensor:
    """Exact match per sequence and question."""
    rows, places = asked.nonzero(as_tuple=True)
    branch = batch.branch[rows, places]
    right = (predicted == batch.labels[rows, places]).long()
    count = int(branch.max()) + 1
    exact = torch.full((batch.input_ids.shape[0], count), -1, dtype=torch.long)
    exact.view(-1).scatter_reduce_(0, (rows * count + branch).cpu(), right.cpu(), "amin", include_self=False)
    return exact
