"""Stage 1 and 2.5: the region branch learns tri-state maps (docs/method.md 5.4)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.prompt import Prompt
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.settings import View
from qzoom.store.records import RecordStore, Stored
from qzoom.store.schema import Question, RegionLabel
from qzoom.training.forward import region_logits_at, run_stack
from qzoom.training.losses import region_loss
from qzoom.training.samples import HiddenStateCache, SampleUse, conversation_ids, open_stores, prompt_of
from qzoom.training.stages import StageRecipe

__all__ = ["RegionTask"]


@dataclass(frozen=True, slots=True)
class _Sample:
    """One sequence: turns in order; those with labels that can be learnt from carry them."""

    store: RecordStore
    question: Question
    turns: tuple[RegionLabel, ...]
    labels: tuple[Stored | None, ...]

    @property
    def weight(self) -> int:
        return sum(t.valid for t, stored in zip(self.turns, self.labels, strict=True) if stored is not None)


class RegionTask:
    """Label maps of one or more stores.

    Args:
        recipe: which ones, and how pictures are looked at.
        engine: whose tokenizer is used.

    Raises:
        DataError: no usable labels.
    """

    def __init__(self, recipe: StageRecipe, engine: Engine) -> None:
        self._recipe = recipe
        self._chat = ChatEncoder(engine.backbone)
        self._hidden = HiddenStateCache(recipe.cache_gb)
        self.stores = open_stores(recipe.labels, "regions")
        self._samples = [s for store in self.stores for s in self._of_store(store) if s.weight > 0]
        if not self._samples:
            raise DataError(f"There are no usable labels in {', '.join(recipe.labels)}; label more questions.")

    @cached_property
    def weights(self) -> Sequence[int]:
        """Valid cells of each sample."""
        return [sample.weight for sample in self._samples]

    @cached_property
    def identity(self) -> str:
        """Digest of the labels' ids."""
        names = [stored.id if stored else "-" for sample in self._samples for stored in sample.labels]
        return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]

    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Binary cross entropy, summed over the valid cells."""
        assert engine.region is not None
        backbone, recompute = engine.backbone, self._recipe.gradient_checkpointing
        chosen = [self._samples[use.index] for use in uses]
        sequences = [self._sequence(sample) for sample in chosen]
        tokens = [self._tokens(sample, use) for sample, use in zip(chosen, uses, strict=True)]

        def make(place: int) -> Prompt:
            sample, ids = chosen[place], sequences[place][0]
            view: View = sample.turns[0].view
            images = self._recipe.images
            return prompt_of(engine, sample.question, ids, view=view, tokens=tokens[place], images=images)

        keys = [(use.index, count) for use, count in zip(uses, tokens, strict=True)]
        prompts, shared = self._hidden.get(engine, keys, make)
        # one placeholder became many visual tokens
        asking = [
            [query + len(prompt) - len(ids) for query in queries]
            for prompt, (ids, queries) in zip(prompts, sequences, strict=True)
        ]
        layers = list(engine.region.layers)
        positions = [prompt.positions for prompt in prompts]
        hidden = run_stack(backbone, layers[:-1], shared, positions, recompute=recompute)
        logits: list[Tensor] = []
        targets: list[Tensor] = []
        for sample, prompt, queries, states in zip(chosen, prompts, asking, hidden, strict=True):
            kept = [i for i, stored in enumerate(sample.labels) if stored is not None]
            logits += region_logits_at(backbone, layers[-1], states, prompt, [queries[i] for i in kept])
            for i in kept:
                labels = sample.store.tensor(cast(Stored, sample.labels[i]), "labels")
                targets.append(torch.as_tensor(labels, device=states.device).long())
        return region_loss(logits, targets) * sum(sample.weight for sample in chosen)

    def _sequence(self, sample: _Sample) -> tuple[list[int], list[int]]:
        """Token ids of a sample, and the indices of its asking tokens."""
        found = conversation_ids(self._chat, [(turn.prompt, turn.text) for turn in sample.turns])
        assert found is not None  # samples whose turns cannot share a sequence were taken apart
        return found

    def _tokens(self, sample: _Sample, use: SampleUse) -> int:
        """Visual tokens of the look: drawn from the recipe's, else those of the look that was labelled."""
        if self._recipe.tokens:
            return random.Random(f"{self._recipe.seed}/{use.index}/{use.epoch}").choice(self._recipe.tokens)
        wanted = sample.store.settings.get("tokens")
        if isinstance(wanted, int):
            return wanted
        stored = next(stored for stored in sample.labels if stored is not None)
        rows, columns = sample.store.tensor(stored, "labels").shape
        return int(rows * columns)

    def _of_store(self, store: RecordStore) -> list[_Sample]:
        """Samples in order: one per question with several turns, or one per turn."""
        grouped: dict[str, list[tuple[Stored, RegionLabel]]] = {}
        for stored, label in store.of_kind(RegionLabel):
            grouped.setdefault(label.question, []).append((stored, label))
        out = []
        for question_id, found in grouped.items():
            question = store.get(question_id).record
            assert isinstance(question, Question)
            together = self._recipe.multi_turn and len(found) > 1
            turns = [(label.prompt, label.text) for _, label in found]
            if together and conversation_ids(self._chat, turns) is not None:
                out.append(_sample(store, question, found))
            else:
                out += [_sample(store, question, [pair]) for pair in found]
        return out


def _sample(store: RecordStore, question: Question, found: Sequence[tuple[Stored, RegionLabel]]) -> _Sample:
    kept = tuple(stored if label.usable else None for stored, label in found)
    return _Sample(store, question, tuple(label for _, label in found), kept)
