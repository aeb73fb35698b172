"""What both trainers are told alike: where, how precisely, how often they save, and to keep quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qzoom.training.distill.recipe import DistillRecipe

__all__ = ["common_arguments", "silence"]

_KEPT = 2


def common_arguments(recipe: DistillRecipe, folder: Path, device: str) -> dict[str, Any]:
    """Arguments of trl's configurations that do not depend on the method."""
    return {
        "output_dir": str(folder),
        "use_cpu": device == "cpu",
        "bf16": recipe.precision == "bfloat16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": recipe.save_steps,
        "save_total_limit": _KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "optim": "adamw_torch",
        "dataloader_pin_memory": device != "cpu",
    }


def silence(trainer: Any) -> None:
    """Take out the callbacks that print."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
