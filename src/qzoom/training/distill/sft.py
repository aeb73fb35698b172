"""Supervised training on agreed answers, by trl's SFTTrainer; only tokens of the answers count.

The trainer gets numbers of rows as its data set; `collate` makes the tensors, so nothing is prepared in advance and a
region is marked or not when its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.training.distill.collate import Collator
from qzoom.training.distill.recipe import DistillRecipe

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTTrainer

__all__ = ["make_sft_trainer"]


def make_sft_trainer(
    model: Any,
    tokenizer: Any,
    collator: Collator,
    rows: int,
    steps: int,
    recipe: DistillRecipe,
    folder: Path,
    *,
    device: str,
    processes: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """The trainer, ready to run.

    Args:
        model: the transformers model, or peft's wrapper around it.
        tokenizer: the student's.
        collator: makes batches of rows.
        rows: of the whole run, `recipe.sft.batch` to a step.
        steps: optimiser steps.
        recipe: how.
        folder: of checkpoints.
        device: "cpu" or "cuda".
        processes: that share a batch.
        callbacks: called around steps.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from qzoom.training.distill.attention import packed_attention
    from qzoom.training.distill.settings import common_arguments, silence

    class Trainer(SFTTrainer):
        """Without a model card for every checkpoint, and with attention that suits small models on a CPU."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with packed_attention(model, inputs, plain):
                return super().compute_loss(model, inputs, *args, **kwargs)

    part, plain = recipe.sft, device == "cpu" and not recipe.gradient_checkpointing
    arguments = SFTConfig(
        **common_arguments(recipe, folder, device),
        max_steps=steps,
        learning_rate=part.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(part.schedule, part.schedule),
        warmup_steps=math.ceil(part.warmup * steps),
        per_device_train_batch_size=part.micro_batch,
        gradient_accumulation_steps=part.batch // (part.micro_batch * processes),
        weight_decay=part.weight_decay,
        adam_beta1=part.betas[0],
        adam_beta2=part.betas[1],
        max_grad_norm=part.clip,
        train_sampling_strategy="sequential",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"row": list(range(rows))}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    silence(trainer)
    return trainer
