"""Supervised training on agreed answers, by trl's SFTTrainer; only tokens of the answers count.

The trainer's data set is the numbers of the schedule's entries; `collate` makes the tensors when their turn comes, so
that nothing is prepared in advance and a region is marked or not by the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qzoom.training.losses import IGNORE
from qzoom.training.optim import MuonWithAdamW, split_matrices
from qzoom.training.run import TrainingRun
from qzoom.training.student.attention import (
    check_supervision,
    has_plain_attention,
    layer_inputs,
    packed_attention,
    supervision_loss,
)
from qzoom.training.student.collate import Collator
from qzoom.training.student.recipe import (
    AttentionSupervision,
    SftSettings,
    StudentRecipe,
    common_arguments,
    forwards_of,
    remove_printers,
)

_AHEAD = 2


class AnswerTrainer(SFTTrainer):
    """Without a model card for every checkpoint, and with attention that suits small models on a CPU."""

    plain_attention = False
    supervision = AttentionSupervision()
    layers: Any = ()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """The trainer's own loss, and that of the supervised heads where the batch has regions."""
        packed = {name: inputs.pop(name) for name in ("regions", "segment") if name in inputs}
        with packed_attention(self.model, inputs, enabled=self.plain_attention):
            if not packed:
                return super().compute_loss(model, inputs, **options)
            layer = self.layers[self.supervision.layer]
            with layer_inputs(layer) as entered:
                result = super().compute_loss(model, inputs, **options)
        with_outputs = options.get("return_outputs")
        loss, *rest = result if with_outputs else (result,)
        labels, heads = inputs["labels"], self.supervision.heads
        extra = supervision_loss(layer, entered, labels, packed, heads)
        loss = loss + self.supervision.weight * self._per_token(extra, labels, options.get("num_items_in_batch"))
        return (loss, *rest) if with_outputs else loss

    def _per_token(self, total: Tensor, labels: Tensor, items: Any) -> Tensor:
        """Per answer token of the whole batch, as trl counts it: over all forwards and processes of a step."""
        if items is None:
            return total / (labels[:, 1:] != IGNORE).sum().clamp(min=1)
        return total / torch.as_tensor(items).clamp(min=1) * self.accelerator.num_processes


def make_sft_trainer(
    run: TrainingRun[StudentRecipe],
    model: Any,
    collator: Collator,
    steps: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> AnswerTrainer:
    """The trainer, ready to run.

    Args:
        run: the student, its recipe and the phase's folder.
        model: the transformers model, or peft's wrapper around it.
        collator: makes batches of the schedule's entries.
        steps: optimiser steps, of `recipe.sft.batch` entries each.
        callbacks: called around steps.
    """
    recipe, backbone = run.recipe, run.engine.backbone
    check_supervision(backbone, recipe.attention_supervision)
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(run, steps),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"row": list(range(steps * recipe.sft.batch))}),
        processing_class=backbone.tokenizer,
        callbacks=list(callbacks),
        optimizers=(make_optimizer(model, recipe.sft), None),
    )
    trainer.plain_attention = uses_plain_attention(run)
    trainer.supervision, trainer.layers = recipe.attention_supervision, backbone.layers
    remove_printers(trainer)
    return trainer


def make_optimizer(model: nn.Module, settings: SftSettings) -> torch.optim.Optimizer | None:
    """The optimiser of a recipe over all weights that train; None leaves the trainer its own AdamW."""
    if settings.optimizer == "adamw":
        return None
    matrices, others = split_matrices((n, w) for n, w in model.named_parameters() if w.requires_grad)
    return MuonWithAdamW(
        matrices, others, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=settings.betas
    )


def uses_plain_attention(run: TrainingRun[StudentRecipe]) -> bool:
    """Whether plain attention computes the loss: on a CPU, without layers that are recomputed in the backward pass."""
    return run.device == "cpu" and not run.recipe.gradient_checkpointing and has_plain_attention(run.engine.backbone)


def _arguments(run: TrainingRun[StudentRecipe], steps: int) -> SFTConfig:
    recipe, settings = run.recipe, run.recipe.sft
    return SFTConfig(
        **common_arguments(run),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=math.ceil(settings.warmup * steps),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=forwards_of(run, settings.batch // settings.micro_batch),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=recipe.loaders,
        dataloader_prefetch_factor=_AHEAD if recipe.loaders else None,
        dataloader_multiprocessing_context="fork" if recipe.loaders else None,
    )
