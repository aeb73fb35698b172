"""Trl's trainers on our prompts: supervised (`AnswerTrainer`) and by reinforcement (`GroupTrainer`).

Their data set is the numbers of the schedule's entries; `collate` makes the tensors when their turn comes. For GRPO
three hooks make the prompts those of the engine: which entries are asked is noted when a generation begins, prompts are
tokenised by `collate.Prompter`, and answers are generated in parts that fit the memory. A reply without a reward (its
judge failed) counts in no mean and has no gradient; trl does that when its only reward is None, which is why accuracy
and form are one reward here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchFeature, ProcessorMixin, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from qzoom.errors import ConfigError
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
from qzoom.training.student.collate import Collator, GrpoPrompt
from qzoom.training.student.recipe import AttentionSupervision, SftSettings, StudentRecipe
from qzoom.training.student.rewards import JudgeCall, accuracy, combine

_AHEAD = 2
_CHECKPOINTS = 2


class AnswerTrainer(SFTTrainer):
    """Without a model card for every checkpoint, and with attention that suits small models on a CPU."""

    plain_attention = False
    supervision = AttentionSupervision()
    layers: Any = ()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
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
    """The trainer of a supervised phase on a transformers model or peft's wrapper around one, ready to run.

    The collator's schedule has `recipe.sft.batch` entries for each of the optimiser steps.
    """
    recipe, backbone = run.recipe, run.engine.backbone
    check_supervision(backbone, recipe.attention_supervision)
    trainer = AnswerTrainer(
        model=model,
        args=_sft_arguments(run, steps),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"row": list(range(steps * recipe.sft.batch))}),
        processing_class=backbone.tokenizer,
        callbacks=list(callbacks),
        optimizers=(make_optimizer(model, recipe.sft), None),
    )
    trainer.plain_attention = uses_plain_attention(run)
    trainer.supervision, trainer.layers = recipe.attention_supervision, backbone.layers
    return _without_printers(trainer)


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


def _sft_arguments(run: TrainingRun[StudentRecipe], steps: int) -> SFTConfig:
    recipe, settings = run.recipe, run.recipe.sft
    return SFTConfig(
        **_common_arguments(run),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=math.ceil(settings.warmup * steps),
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=_forwards_of(run, settings.batch // settings.micro_batch),
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


class PromptProcessor(ProcessorMixin):
    """The processor that the trainer sees, made of the student's parts: its images are finished prompts."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> BatchFeature:
        """Pixels, grids and the kinds of tokens, padded on the left."""
        prompts = [one for group in images for one in group]
        length = max(len(one.ids) for one in prompts)
        kinds = torch.zeros(len(prompts), length, dtype=torch.long)
        for index, one in enumerate(prompts):
            kinds[index, length - len(one.ids) :] = (torch.tensor(one.ids) == one.image_token).long()
        return BatchFeature({**_pixels(prompts), "mm_token_type_ids": kinds})

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """The tokenizer alone; the image processor is the base's."""
        self.tokenizer.save_pretrained(save_directory)


def make_reward(
    collator: Collator, recipe: StudentRecipe, judge: JudgeCall | None = None
) -> Callable[..., list[float | None]]:
    """The one reward function of a run, as the trainer calls it."""

    def reward(
        completions: Sequence[Any], row: Sequence[int], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float | None]:
        rewards = [
            accuracy(
                completion[0]["content"],
                collator.reference(number),
                form=recipe.answer_form,
                longest_plain=recipe.longest_plain,
                counting=recipe.grpo.counting,
                judge=judge,
            )
            for completion, number in zip(completions, row, strict=True)
        ]
        scored = [one.accuracy for one in rewards if one.accuracy is not None]
        log_metric("accuracy", sum(scored) / len(scored) if scored else 0.0)
        log_metric("well_formed", sum(one.form for one in rewards) / len(rewards))
        for kind in ("judge", "unjudged", "failed"):
            log_metric(f"by_{kind}", sum(one.by == kind for one in rewards) / len(rewards))
        return [combine(one, recipe.grpo.format_weight) for one in rewards]

    return reward


class GroupTrainer(GRPOTrainer):
    """Generates from the engine's prompts, at most so many answers at once."""

    def __init__(self, collator: Collator, at_once: int, **settings: Any) -> None:
        self._collator, self._at_once = collator, at_once
        self._prompts: list[GrpoPrompt] = []
        super().__init__(**settings)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        ready: dict[int, GrpoPrompt] = {}
        for entry in inputs:
            if entry["row"] not in ready:
                ready[entry["row"]] = self._collator.prompt(entry["row"])
        self._prompts = [ready[entry["row"]] for entry in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: Any) -> Any:
        return [list(one.ids) for one in self._prompts], [[one] for one in self._prompts], {}

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: Any, has_tool_images: Any = None
    ) -> Any:
        out: list[list[int]] = []
        for begin in range(0, len(prompt_ids), self._at_once):
            some = slice(begin, begin + self._at_once)
            prompts = [group[0] for group in images[some]]
            kinds = [[int(token == one.image_token) for token in one.ids] for one in prompts]
            fields = {**_pixels(prompts), "mm_token_type_ids": kinds}
            out += super()._generate_single_turn(prompt_ids[some], images[some], fields, num_generations)[0]
        return out, None


def make_grpo_trainer(
    run: TrainingRun[StudentRecipe],
    model: Any,
    collator: Collator,
    steps: int,
    *,
    judge: JudgeCall | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GroupTrainer:
    """The trainer of a GRPO phase, ready to run; see `make_sft_trainer`. An entry has one question.

    The judge is for free answers.
    """
    recipe, backbone = run.recipe, run.engine.backbone
    rows = steps * recipe.grpo.batch
    prompts = [[{"role": "user", "content": "."}]] * rows
    trainer = GroupTrainer(
        collator,
        recipe.grpo.micro_batch,
        model=model,
        reward_funcs=make_reward(collator, recipe, judge),
        args=_grpo_arguments(run, steps),
        train_dataset=Dataset.from_dict({"row": list(range(rows)), "prompt": prompts}),
        processing_class=PromptProcessor(backbone.image_processor, backbone.tokenizer, backbone.chat_template),
        callbacks=list(callbacks),
    )
    return _without_printers(trainer)


def _grpo_arguments(run: TrainingRun[StudentRecipe], steps: int) -> GRPOConfig:
    settings = run.recipe.grpo
    return GRPOConfig(
        **_common_arguments(run),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=_forwards_of(run, settings.batch * settings.group // settings.micro_batch),
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        shuffle_dataset=False,
        temperature=settings.temperature,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=settings.clip_low,
        epsilon_high=settings.clip_high,
        delta=settings.dual_clip,
        loss_type="dapo",
        scale_rewards="group",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        log_completions=False,
        log_multimodal=False,
    )


def _pixels(prompts: Sequence[GrpoPrompt]) -> Mapping[str, Any]:
    return {
        "pixel_values": torch.cat([one.view.pixels for one in prompts]),
        "image_grid_thw": torch.cat([one.view.grid_thw for one in prompts]),
    }


def _common_arguments(run: TrainingRun[StudentRecipe]) -> dict[str, Any]:
    """Arguments of trl's configurations that do not depend on the method."""
    recipe, cpu = run.recipe, run.device == "cpu"
    return {
        "output_dir": str(run.folder),
        "use_cpu": cpu,
        "bf16": recipe.precision == "bfloat16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": _CHECKPOINTS,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "optim": "adamw_torch",
        "dataloader_pin_memory": not cpu,
    }


def _forwards_of(run: TrainingRun[StudentRecipe], total: int) -> int:
    """Forward passes of each process in a step of so many (ConfigError: the processes cannot share them equally)."""
    if total % run.processes:
        raise ConfigError(
            f"A step of {total} forwards cannot be shared by {run.processes} processes; change batch or micro_batch."
        )
    return total // run.processes


def _without_printers(trainer: Any) -> Any:
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    return trainer
