"""Forward pass and loss: the language-model loss plus three auxiliary losses from renderer ground truth.

Glyph loss: a temporary linear layer predicts, from every visual token that the vision tower gives to the decoder, the
characters printed there; so the tower learns to read directly, not only through the answers.
Object loss: another one predicts colour and shape of the object that the token shows, so that the token of a label
encodes the object that it belongs to.
Pointing loss: two attention heads of one decoder layer are trained to attend to the visual token with the next answer
character (one in the first view, one in the finest view that has it). The losses exist in training only: the exported
weights are those of the plain model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from qzoom.data.synthetic.texts import COLOURS, SHAPES
from qzoom.training.batch import GLYPHS, IGNORE, SLOTS, Batch
from qzoom.training.student.attention import attention_logits

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

__all__ = ["GuidedModel", "PassResult"]

OBJECT_KINDS = (len(COLOURS) + 1, len(SHAPES) + 1)


@dataclass(frozen=True, slots=True)
class PassResult:
    """Outcome of one pass. `loss` carries the gradient; the others are detached. `exact` (B, questions) is 1 where
    every answer token is the arg-max given the ones before it, which is what greedy decoding would write; -1 where
    there is no such question."""

    loss: torch.Tensor
    answer_loss: float
    glyph_loss: float
    object_loss: float
    pointing_loss: float
    exact: torch.Tensor
    predictions: list[torch.Tensor]


class GuidedModel(nn.Module):
    """The stock model with the training-time guides around it; while `shield_tower` is set, the glyph and object guides
    learn from the vision tower without teaching it."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        *,
        glyph_weight: float = 0.5,
        object_weight: float = 0.5,
        pointing_weight: float = 0.3,
        pointing_layer: int = 4,
        pointing_heads: tuple[int, int] = (0, 2),
    ) -> None:
        super().__init__()
        self.model = model
        width = int(model.lm_head.in_features)
        self.glyph_head = nn.Linear(width, SLOTS * (len(GLYPHS) + 1))
        nn.init.normal_(self.glyph_head.weight, std=width**-0.5)
        nn.init.zeros_(self.glyph_head.bias)
        self.object_head = nn.Linear(width, sum(OBJECT_KINDS))
        nn.init.normal_(self.object_head.weight, std=width**-0.5)
        nn.init.zeros_(self.object_head.bias)
        self.glyph_weight = glyph_weight
        self.object_weight = object_weight
        self.pointing_weight = pointing_weight
        self.pointing_layer = pointing_layer
        self.pointing_heads = pointing_heads
        self.shield_tower = False

    def forward(self, batch: Batch) -> PassResult:
        """Losses and exact matches of a batch; without questions only the vision tower runs."""
        core = self.model.model
        if not bool((batch.labels != IGNORE).any()):
            visual = torch.cat(
                list(core.get_image_features(batch.pixels, batch.grid_thw, return_dict=True).pooler_output)
            )
            glyph, seen_objects = self._vision_losses(visual, batch)
            loss = self.glyph_weight * glyph + self.object_weight * seen_objects
            return PassResult(loss, 0.0, glyph.item(), seen_objects.item(), 0.0, torch.empty(0, 0), [])
        seen: dict[str, Any] = {}

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["hidden"] = args[0] if args else kwargs["hidden_states"]
            seen["rotary"] = kwargs["position_embeddings"]

        layer = core.language_model.layers[self.pointing_layer]
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            vision = core.get_image_features(batch.pixels, batch.grid_thw, return_dict=True)
            visual = torch.cat(list(vision.pooler_output))
            hidden = core(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                mm_encoder_outputs={"image": vision},
                use_cache=False,
            ).last_hidden_state
        finally:
            handle.remove()
        asked = batch.labels != IGNORE
        logits = self.model.lm_head(hidden[asked]).float()
        labels = batch.labels[asked]
        answer = F.cross_entropy(logits, labels)
        glyph, objects = self._vision_losses(visual, batch)
        pointing = self._pointing_loss(layer, seen["hidden"], seen["rotary"], batch, asked)
        loss = answer + self.glyph_weight * glyph + self.object_weight * objects + self.pointing_weight * pointing
        exact, predictions = _exact(logits.argmax(-1), batch, asked)
        return PassResult(loss, answer.item(), glyph.item(), objects.item(), pointing.item(), exact, predictions)

    def _vision_losses(self, visual: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        visual = visual.detach() if self.shield_tower else visual
        return self._glyph_loss(visual, batch.glyph_target), self._object_loss(visual, batch.object_target)

    def _object_loss(self, visual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of colour and of shape, tokens without an object weighted a tenth."""
        known = target[:, 0] != IGNORE
        if not bool(known.any()):
            return visual.sum() * 0.0
        target = target[known]
        weight = torch.where(target[:, 0] > 0, 1.0, 0.1)
        total = visual.new_zeros(())
        for kind, logits in enumerate(self.object_head(visual[known]).float().split(OBJECT_KINDS, dim=-1)):
            total = total + (F.cross_entropy(logits, target[:, kind], reduction="none") * weight).sum()
        return total / weight.sum()

    def _glyph_loss(self, visual: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over printed slots plus a tenth of that over empty ones."""
        known = (target != IGNORE).any(-1)
        if not bool(known.any()):
            return visual.sum() * 0.0
        logits = self.glyph_head(visual[known]).float().view(-1, len(GLYPHS) + 1)
        target = target[known].view(-1)
        each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
        weight = (target > 0).float() + 0.1 * (target == 0).float()
        return (each * weight).sum() / weight.sum().clamp(min=1.0)

    def _pointing_loss(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        asked: torch.Tensor,
    ) -> torch.Tensor:
        """Cross-entropy of two heads' attention at the answer positions against the visual token to look at."""
        rows, places = asked.nonzero(as_tuple=True)
        targets = torch.stack([batch.locate_target[rows, places], batch.read_target[rows, places]])
        if not bool((targets != IGNORE).any()):
            return hidden.sum() * 0.0
        logits = attention_logits(layer, hidden, rotary, rows, places, heads=self.pointing_heads)
        logits = logits.masked_fill(~batch.mask[rows, 0, places][:, None], float("-inf"))
        return F.cross_entropy(logits.transpose(0, 1).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def _exact(predicted: torch.Tensor, batch: Batch, asked: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Exact match per sequence and question, and the predicted answer tokens of every sequence's first question."""
    rows, places = asked.nonzero(as_tuple=True)
    branch = batch.branch[rows, places]
    right = (predicted == batch.labels[rows, places]).long()
    count = int(branch.max()) + 1
    exact = torch.full((batch.input_ids.shape[0], count), -1, dtype=torch.long)
    exact.view(-1).scatter_reduce_(0, (rows * count + branch).cpu(), right.cpu(), "amin", include_self=False)
    first = branch == 0
    return exact, [predicted[first & (rows == row)].cpu() for row in range(batch.input_ids.shape[0])]
