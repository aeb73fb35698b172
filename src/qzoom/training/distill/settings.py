"""What both trainers are told alike: where, how precisely, how often they save, and to keep quiet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import ConfigError
from qzoom.training.distill.recipe import DistillRecipe

__all__ = ["Place", "common_arguments", "silence"]

_KEPT = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part runs.

    Args:
        folder: of its checkpoints.
        device: "cpu" or "cuda".
        processes: that share a batch.
    """

    folder: Path
    device: str = "cpu"
    processes: int = 1

    def forwards(self, together: int) -> int:
        """Forward passes of each process, of those that all make together.

        Raises:
            ConfigError: they cannot be shared equally.
        """
        if together % self.processes:
            raise ConfigError(
                f"A step of {together} forwards cannot be shared by {self.processes} processes; change batch or "
                "micro_batch."
            )
        return together // self.processes


def common_arguments(recipe: DistillRecipe, place: Place) -> dict[str, Any]:
    """Arguments of trl's configurations that do not depend on the method."""
    return {
        "output_dir": str(place.folder),
        "use_cpu": place.device == "cpu",
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
        "dataloader_pin_memory": place.device != "cpu",
    }


def silence(trainer: Any) -> None:
    """Take out the callbacks that print."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
