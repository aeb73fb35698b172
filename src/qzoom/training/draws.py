"""The batches of a base run, each determined by its number: drawn on demand, or in advance by other processes.

A CPU is busy with one small batch. A GPU would wait for the images, so `loaders` processes draw ahead, and `gather`
draws of a task make one batch. In both cases a batch depends on the recipe and its number alone, so a run that was
stopped resumes with the same images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader, Dataset

from qzoom.training.batch import Batch, Example, collate
from qzoom.training.receipts import ReceiptSet
from qzoom.training.recipe import BaseRecipe
from qzoom.training.tasks import make_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Draws"]

_AHEAD = 4


class Draws(Dataset[tuple[str, Batch]]):
    """All batches of one process of a run, by number: step times `micro_batches` plus the place in the step.

    Args:
        recipe: exercises, seed, and how many draws a batch gathers.
        tokenizer: the model's.
        receipts: real ones, where a stage mixes them.
        rank: of the process; others draw other pictures for the same exercises.
    """

    def __init__(
        self, recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast, receipts: ReceiptSet | None, rank: int
    ) -> None:
        self._recipe, self._tokenizer, self._receipts, self._rank = recipe, tokenizer, receipts, rank

    def __len__(self) -> int:
        return self._recipe.steps * self._recipe.micro_batches

    def __getitem__(self, number: int) -> tuple[str, Batch]:
        """The exercise and its batch."""
        recipe = self._recipe
        step, micro = divmod(number, recipe.micro_batches)
        mix = recipe.at(step)[0].mix
        names = sorted(mix)
        shares = np.array([mix[name] for name in names])
        shared = np.random.default_rng([recipe.seed, step, micro])
        task = names[int(shared.choice(len(names), p=shares / shares.sum()))]
        examples: list[Example] = []
        for index in range(recipe.gather):
            rng = np.random.default_rng([recipe.seed, step, micro, self._rank * recipe.gather + index])
            examples += make_examples(task, rng, copy.deepcopy(shared), receipts=self._receipts)
        return task, collate(examples, self._tokenizer)

    def following(self, step: int) -> Iterator[tuple[str, Batch]]:
        """The batches from a step on, in order."""
        rest = range(step * self._recipe.micro_batches, len(self))
        loaders = self._recipe.loaders
        ahead = {"prefetch_factor": _AHEAD, "multiprocessing_context": "fork"} if loaders else {}
        return iter(DataLoader(self, batch_size=None, sampler=rest, num_workers=loaders, **ahead))  # type: ignore[arg-type]
