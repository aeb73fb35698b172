"""Plain matrix-product attention for packed questions of small models on a CPU, for as long as a loss is computed.

The engine, which validates between steps, and sampling go on with the stock kernels.

The optimiser of supervised training: AdamW, or Muon for the matrices with AdamW for the rest, in one.

Muon's update has the size of AdamW's (`match_rms_adamw`), so both share one learning rate, schedule and checkpoint.

Region as privileged information, shown to the attention instead of the eye: chosen heads learn to look at it.

While the answer is written, the share of a head's attention that falls on the region's visual tokens is raised by its
negative logarithm. The picture stays unmarked, so training and use see the same one. An option of ours; the authors
(arXiv 2602.11858) draw the region only.

Supervised training on agreed answers, by trl's SFTTrainer; only tokens of the answers count.

The trainer gets numbers of rows as its data set; `collate` makes the tensors, so nothing is prepared in advance and a
region is marked or not when its turn comes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from qzoom.errors import ConfigError
from qzoom.training.attention import attention_logits
from qzoom.training.student.collate import IGNORE, Collator
from qzoom.training.student.recipe import DistillRecipe, Place, PointingPart, SftPart, common_arguments, silence

__all__ = [
    "AnswerTrainer",
    "MuonWithAdamW",
    "check_pointing",
    "fits_plain",
    "make_optimizer",
    "make_sft_trainer",
    "packed_attention",
    "pointing_loss",
    "split_matrices",
    "watched_layer",
]


@contextlib.contextmanager
def packed_attention(model: Any, inputs: Mapping[str, Any], wanted: bool) -> Iterator[None]:
    """Use `training.attention` inside the block, for inputs with a 4-D mask.

    Args:
        model: a Qwen3-VL model, or a wrapper around it.
        inputs: of the forward pass.
        wanted: whether to use it at all.
    """
    config = model.config
    if not wanted or inputs["attention_mask"].ndim != 4:
        yield
        return
    from qzoom.training.attention import use_plain_attention

    parts = (config.text_config, config.vision_config)
    before = [part._attn_implementation for part in parts]
    stock = getattr(model, "get_base_model", lambda: model)()
    try:
        use_plain_attention(stock)
        yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part._attn_implementation = name


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimisers that step together and keep their state in one place.

    Args:
        matrices: updated by Muon.
        others: updated by AdamW, without decay.
        lr: of both.
        weight_decay: of the matrices.
        betas: of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self._parts: tuple[torch.optim.Optimizer, ...] = ()
        if matrices:
            self._parts += (
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            )
        if others:
            self._parts += (torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=betas),)
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all weights."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss


def split_matrices(weights: Iterable[tuple[str, nn.Parameter]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices inside the towers, and all else: tables, norms, biases, convolutions and the guides."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in weights:
        table = "embed" in name or "glyph_head" in name or "object_head" in name or "lm_head" in name
        (matrices if weight.ndim == 2 and not table else others).append(weight)
    return matrices, others


def make_optimizer(model: nn.Module, part: SftPart) -> torch.optim.Optimizer | None:
    """The optimiser of a recipe over all weights that train; None leaves the trainer its own AdamW."""
    if part.optimizer == "adamw":
        return None
    matrices, others = split_matrices((n, w) for n, w in model.named_parameters() if w.requires_grad)
    return MuonWithAdamW(matrices, others, lr=part.learning_rate, weight_decay=part.weight_decay, betas=part.betas)


def check_pointing(model: Any, part: PointingPart) -> None:
    """Refuse a layer, heads or a family that cannot point.

    Raises:
        ConfigError: it says which.
    """
    if not part.weight:
        return
    if model.config.model_type != "qwen3_vl":
        raise ConfigError(f"pointing works for Qwen3-VL students, not {model.config.model_type}; set its weight to 0.")
    text = model.config.text_config
    if part.layer >= text.num_hidden_layers:
        raise ConfigError(f"pointing: layer {part.layer} is outside the student's {text.num_hidden_layers} layers.")
    if max(part.heads) >= text.num_attention_heads:
        raise ConfigError(
            f"pointing: head {max(part.heads)} is outside the student's {text.num_attention_heads} heads."
        )


@contextlib.contextmanager
def watched_layer(layer: Any) -> Iterator[dict[str, Any]]:
    """What enters a decoder layer inside the block: "hidden" (B, S, width) and "rotary"."""
    seen: dict[str, Any] = {}

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]
        seen["rotary"] = kwargs["position_embeddings"]

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def pointing_loss(
    layer: Any, seen: Mapping[str, Any], labels: Tensor, given: Mapping[str, Tensor], heads: tuple[int, ...]
) -> Tensor:
    """Negative logarithm of the attention on the region: mean over heads, sum over the places that write an answer.

    Args:
        layer: of the decoder.
        seen: what entered it, see `watched_layer`.
        labels: (B, S), -100 outside the answers.
        given: `regions` (B, questions, S) and `branch` (B, S), see `qzoom.training.student.collate`.
        heads: that point.

    Returns:
        A scalar, 0 without any region.
    """
    regions, branch = given["regions"], given["branch"]
    writes = torch.zeros_like(labels, dtype=torch.bool)
    writes[:, :-1] = labels[:, 1:] != IGNORE
    rows, places = writes.nonzero(as_tuple=True)
    targets = regions[rows, branch[rows, places].clamp(min=1) - 1]
    known = targets.any(-1)
    if not bool(known.any()):
        return torch.as_tensor(seen["hidden"].sum() * 0.0)
    rows, places, targets = rows[known], places[known], targets[known]
    logits = attention_logits(layer, seen["hidden"], seen["rotary"], rows, places, heads)
    logits = logits.masked_fill(~_may_attend(branch, rows, places)[:, None], float("-inf"))
    on_region = logits.masked_fill(~targets[:, None], float("-inf"))
    return (logits.logsumexp(-1) - on_region.logsumexp(-1)).mean(-1).sum()


def _may_attend(branch: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """(n, S): what came before, of the picture and of the own question."""
    own = branch[rows, places][:, None]
    before = torch.arange(branch.shape[1], device=branch.device)[None] <= places[:, None]
    return ((branch[rows] == 0) | (branch[rows] == own)) & before


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
