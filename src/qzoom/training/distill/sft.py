"""Supervised training on agreed answers, by trl's SFTTrainer; only tokens of the answers count.

The trainer gets numbers of rows as its data set; `collate` makes the tensors, so nothing is prepared in advance and a
region is marked or not when its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qzoom.training.distill.attention import packed_attention
from qzoom.training.distill.collate import IGNORE, Collator
from qzoom.training.distill.optimizer import make_optimizer
from qzoom.training.distill.pointing import check_pointing, pointing_loss, watched_layer
from qzoom.training.distill.recipe import DistillRecipe, PointingPart
from qzoom.training.distill.settings import Place, common_arguments, silence

__all__ = ["AnswerTrainer", "fits_plain", "make_sft_trainer"]

_AHEAD = 2


class AnswerTrainer(SFTTrainer):
    """Without a model card for every checkpoint, and with attention that suits small models on a CPU."""

    plain_attention = False
    pointing = PointingPart()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss, and the pointing heads' beside it where the batch has regions."""
        given = {name: inputs.pop(name) for name in ("regions", "branch") if name in inputs}
        with packed_attention(self.model, inputs, self.plain_attention):
            if not given:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            base: Any = self.model
            layer = getattr(base, "get_base_model", lambda: base)().model.language_model.layers[self.pointing.layer]
            with watched_layer(layer) as seen:
                found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *rest = found if return_outputs else (found,)
        loss = loss + self.pointing.weight * self._pointing(layer, seen, inputs["labels"], given, num_items_in_batch)
        return (loss, *rest) if return_outputs else loss

    def _pointing(self, layer: Any, seen: Any, labels: Tensor, given: dict[str, Tensor], items: Any) -> Tensor:
        """Per answer token of the whole batch, as trl counts it: over all forwards and processes of a step."""
        total = pointing_loss(layer, seen, labels, given, self.pointing.heads)
        if items is None:
            return total / (labels[:, 1:] != IGNORE).sum().clamp(min=1)
        return total / torch.as_tensor(items).clamp(min=1) * self.accelerator.num_processes


def make_sft_trainer(
    model: Any,
    tokenizer: Any,
    collator: Collator,
    rows: int,
    steps: int,
    recipe: DistillRecipe,
    place: Place,
    callbacks: Sequence[TrainerCallback] = (),
) -> AnswerTrainer:
    """The trainer, ready to run.

    Args:
        model: the transformers model, or peft's wrapper around it.
        tokenizer: the student's.
        collator: makes batches of rows.
        rows: of the whole run, `recipe.sft.batch` to a step.
        steps: optimiser steps.
        recipe: how.
        place: where.
        callbacks: called around steps.
    """
    check_pointing(model, recipe.pointing)
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(recipe, place, steps),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"row": list(range(rows))}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(make_optimizer(model, recipe.sft), None),
    )
    trainer.plain_attention = fits_plain(model, recipe, place)
    trainer.pointing = recipe.pointing
    silence(trainer)
    return trainer


def fits_plain(model: Any, recipe: DistillRecipe, place: Place) -> bool:
    """Whether plain attention computes the loss: Qwen3-VL on a CPU, no layers recomputed in the backward pass."""
    return place.device == "cpu" and not recipe.gradient_checkpointing and model.config.model_type == "qwen3_vl"


def _arguments(recipe: DistillRecipe, place: Place, steps: int) -> SFTConfig:
    part = recipe.sft
    return SFTConfig(
        **common_arguments(recipe, place),
        max_steps=steps,
        learning_rate=part.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(part.schedule, part.schedule),
        warmup_steps=math.ceil(part.warmup * steps),
        per_device_train_batch_size=part.micro_batch,
        gradient_accumulation_steps=place.forwards(part.batch // part.micro_batch),
        weight_decay=part.weight_decay,
        adam_beta1=part.betas[0],
        adam_beta2=part.betas[1],
        max_grad_norm=part.clip,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=recipe.loaders,
        dataloader_prefetch_factor=_AHEAD if recipe.loaders else None,
        dataloader_multiprocessing_context="fork" if recipe.loaders else None,
    )
