"""Stage 1 and 2.5: the region branch learns tri-state maps (method.md 5.4)."""

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
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.respond import View
from qzoom.records.schema import Question, RegionLabel
from qzoom.records.store import RecordStore, Stored
from qzoom.training.losses import region_loss
from qzoom.training.stages.forward import hidden_states, region_logits_at, run_stack
from qzoom.training.stages.recipe import StageRecipe
from qzoom.training.stages.tasks import Draw, conversation_ids, open_stores, prompt_of

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

    def loss(self, engine: Engine, draws: Sequence[Draw]) -> Tensor:
        """Binary cross entropy, summed over the valid cells."""
        assert engine.region is not None
        backbone, recompute = engine.backbone, self._recipe.gradient_checkpointing
        chosen = [self._samples[draw.index] for draw in draws]
        prompts, asking = [], []
        for draw, sample in zip(draws, chosen, strict=True):
            found = conversation_ids(self._chat, [(turn.prompt, turn.text) for turn in sample.turns])
            assert found is not None
            ids, queries = found
            prompt = self._prompt(engine, sample, draw, ids)
            shift = len(prompt) - len(ids)  # one placeholder became many visual tokens
            prompts.append(prompt)
            asking.append([query + shift for query in queries])
        with torch.no_grad():
            shared = hidden_states(backbone, prompts, engine.config.shared_layers)
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

    def _prompt(self, engine: Engine, sample: _Sample, draw: Draw, ids: Sequence[int]):  # noqa: ANN202
        view: View = sample.turns[0].view
        choices = self._recipe.tokens or (self._tokens(sample),)
        tokens = random.Random(f"{self._recipe.seed}/{draw.index}/{draw.visit}").choice(choices)
        return prompt_of(engine, sample.question, ids, view=view, tokens=tokens, images=self._recipe.images)

    @staticmethod
    def _tokens(sample: _Sample) -> int:
        """Visual tokens of the look that was labelled."""
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
