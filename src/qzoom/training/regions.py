"""Stage 1 and 2.5: the region branch learns ternary label maps (docs/method.md 5.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qzoom.engine.prompt import Prompt
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.settings import View
from qzoom.store.records import RecordStore, Stored
from qzoom.store.schema import Question, RegionLabel
from qzoom.training.forward import region_logits_at, run_stack
from qzoom.training.losses import region_loss
from qzoom.training.samples import SampleUse, StageTask, conversation_ids, prompt_of, question_of, sample_digest
from qzoom.training.stages import StageRecipe


@dataclass(frozen=True, slots=True)
class RegionSample:
    """One sequence: turns in order; those with usable labels carry them."""

    store: RecordStore
    question: Question
    turns: tuple[RegionLabel, ...]
    labels: tuple[Stored | None, ...]

    @property
    def weight(self) -> int:
        """Valid cells of all labels."""
        return sum(t.valid for t, stored in zip(self.turns, self.labels, strict=True) if stored is not None)


class RegionMapTask(StageTask):
    """Label maps of one or more stores (DataError: no usable labels)."""

    def __init__(self, recipe: StageRecipe, engine: Engine) -> None:
        super().__init__(recipe, engine, "regions")
        self.samples = [s for store in self.stores for s in self._of_store(store) if s.weight > 0]
        if not self.samples:
            raise DataError(
                f"There are no usable labels in {', '.join(recipe.labels)}; `qzoom label regions` on the same folder "
                "says why (no answers, attention too weak or too spread out)."
            )
        self.weights = [sample.weight for sample in self.samples]
        names = [stored.id if stored else "-" for sample in self.samples for stored in sample.labels]
        self.identity = sample_digest(" ".join(names))

    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Binary cross entropy, summed over the valid cells."""
        assert engine.region is not None
        backbone, recompute = engine.backbone, self.recipe.gradient_checkpointing
        chosen = [self.samples[use.index] for use in uses]
        sequences = [self._sequence(sample) for sample in chosen]
        tokens = [self._tokens(sample, use) for sample, use in zip(chosen, uses, strict=True)]

        def make(index: int) -> Prompt:
            sample, ids = chosen[index], sequences[index][0]
            view: View = sample.turns[0].view
            images = self.recipe.images
            return prompt_of(engine, sample.question, ids, view=view, tokens=tokens[index], images=images)

        keys = [(use.index, count) for use, count in zip(uses, tokens, strict=True)]
        prompts, shared = self.shared_states(engine, keys, make)
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
            logits += region_logits_at(engine, states, prompt, [queries[i] for i in kept])
            for i in kept:
                labels = sample.store.tensor(cast(Stored, sample.labels[i]), "labels")
                targets.append(torch.as_tensor(labels, device=states.device).long())
        focal = self.recipe.region_loss == "focal"
        return region_loss(logits, targets, focal=focal) * sum(sample.weight for sample in chosen)

    def _sequence(self, sample: RegionSample) -> tuple[list[int], list[int]]:
        """Token ids of a sample, and the indices of its asking tokens."""
        ids = conversation_ids(self.chat, [(turn.prompt, turn.text) for turn in sample.turns])
        assert ids is not None  # samples whose turns cannot share a sequence were taken apart
        return ids

    def _tokens(self, sample: RegionSample, use: SampleUse) -> int:
        """Visual tokens of the coarse pass: drawn from the recipe's, else those of the pass that was labelled."""
        if self.recipe.tokens:
            return random.Random(f"{self.recipe.seed}/{use.index}/{use.epoch}").choice(self.recipe.tokens)
        wanted = sample.store.settings.get("tokens")
        if isinstance(wanted, int):
            return wanted
        stored = next(stored for stored in sample.labels if stored is not None)
        rows, columns = sample.store.tensor(stored, "labels").shape
        return int(rows * columns)

    def _of_store(self, store: RecordStore) -> list[RegionSample]:
        """Samples in order: one per question with several turns, or one per turn."""
        grouped: dict[str, list[tuple[Stored, RegionLabel]]] = {}
        for stored, label in store.of_kind(RegionLabel):
            grouped.setdefault(label.question, []).append((stored, label))
        out = []
        for question_id, labels in grouped.items():
            question = question_of(store, question_id)
            together = self.recipe.multi_turn and len(labels) > 1
            turns = [(label.prompt, label.text) for _, label in labels]
            if together and conversation_ids(self.chat, turns) is not None:
                out.append(_sample(store, question, labels))
            else:
                out += [_sample(store, question, [pair]) for pair in labels]
        return out


def _sample(store: RecordStore, question: Question, labels: Sequence[tuple[Stored, RegionLabel]]) -> RegionSample:
    usable = tuple(stored if label.usable else None for stored, label in labels)
    return RegionSample(store, question, tuple(label for _, label in labels), usable)
