"""Stage 3: the gate learns when the coarse look is enough (method.md 2 and 8)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.prompt import Prompt
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.gate import Strategy, Trajectory, categorise, draw_label, select_items
from qzoom.store.records import RecordStore
from qzoom.store.schema import Ladder, Question
from qzoom.training.forward import run_stack
from qzoom.training.losses import gate_loss
from qzoom.training.samples import Draw, SharedStates, conversation_ids, open_stores, prompt_of
from qzoom.training.stages import StageRecipe

__all__ = ["GateSample", "GateTask", "gate_samples"]


@dataclass(frozen=True, slots=True)
class GateSample:
    """One question on one rung.

    Args:
        question: the record.
        turn: index of the turn.
        tokens: visual tokens of the look.
        target: 1 look closer, 0 enough.
    """

    question: Question
    turn: int
    tokens: int
    target: int


def gate_samples(stores: Sequence[RecordStore], strategy: Strategy, seed: int) -> list[GateSample]:
    """Questions to train on, each with a rung and a target.

    "consistency" keeps transitions and as many easy questions; "prediction_vs_gt" (the ablation) draws as many
    questions from all of them.
    """
    found = [(store, ladder) for store in stores for _, ladder in store.of_kind(Ladder)]
    climbed = [Trajectory(ladder.tokens, ladder.answers, ladder.annotation) for _, ladder in found]
    chosen = select_items(climbed, seed)
    if strategy == "prediction_vs_gt":
        chosen = random.Random(seed).sample(range(len(climbed)), len(chosen))
    out = []
    for index in chosen:
        store, ladder = found[index]
        target, tokens = draw_label(climbed[index], random.Random(f"{seed}/{ladder.question}/{ladder.turn}"), strategy)
        question = store.get(ladder.question).record
        assert isinstance(question, Question)
        if target >= 0:
            out.append(GateSample(question, ladder.turn, tokens, target))
    return out


class GateTask:
    """Gate targets of one or more stores of ladders.

    Args:
        recipe: which ones, and how labels are drawn.
        engine: whose tokenizer is used.

    Raises:
        DataError: no question changes its answer along the ladder, so there is nothing to learn.
    """

    def __init__(self, recipe: StageRecipe, engine: Engine) -> None:
        self._recipe = recipe
        self._chat = ChatEncoder(engine.backbone)
        self._shared = SharedStates(recipe.cache_gb)
        self.stores = open_stores(recipe.labels, "gate")
        self.samples = gate_samples(self.stores, recipe.strategy, recipe.seed)
        if not self.samples:
            kinds = [
                categorise(Trajectory(ladder.tokens, ladder.answers, ladder.annotation))
                for store in self.stores
                for _, ladder in store.of_kind(Ladder)
            ]
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("hard", "easy", "dropped"))
            raise DataError(
                f"No question of {', '.join(recipe.labels)} is wrong on coarse looks and right on finer ones "
                f"({counts}); label more questions, or a ladder that reaches lower."
            )

    @cached_property
    def weights(self) -> Sequence[int]:
        """One target each."""
        return [1] * len(self.samples)

    @cached_property
    def identity(self) -> str:
        """Digest of questions, rungs and targets."""
        text = repr([(s.question.values(), s.turn, s.tokens, s.target) for s in self.samples])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def loss(self, engine: Engine, draws: Sequence[Draw]) -> Tensor:
        """Binary cross entropy, summed over the samples."""
        gate = engine.gate
        assert gate is not None
        backbone = engine.backbone
        chosen = [self.samples[draw.index] for draw in draws]

        def make(place: int) -> Prompt:
            sample = chosen[place]
            found = conversation_ids(self._chat, [(sample.question.turns[sample.turn].question, "")])
            assert found is not None
            images = self._recipe.images
            return prompt_of(engine, sample.question, found[0], view="dynamic", tokens=sample.tokens, images=images)

        prompts, shared = self._shared.of(engine, [draw.index for draw in draws], make)
        positions = [prompt.positions for prompt in prompts]
        recompute = self._recipe.gradient_checkpointing
        hidden = run_stack(backbone, list(gate.layers), shared, positions, recompute=recompute)
        logits = gate.logit(torch.stack([states[-1] for states in hidden]))
        targets = torch.tensor([sample.target for sample in chosen], device=logits.device)
        return gate_loss(logits, targets) * len(chosen)
