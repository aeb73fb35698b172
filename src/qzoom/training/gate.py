"""Stage 3: the gate learns when the coarse pass is enough (docs/method.md 2 and 8)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.engine.prompt import Prompt
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.gate import Strategy, draw_label, gate_report, select_balanced, select_items, zoom_label
from qzoom.store.records import RecordStore
from qzoom.store.schema import Question, ResolutionSweep, ZoomComparison
from qzoom.training.forward import run_stack
from qzoom.training.losses import gate_loss
from qzoom.training.samples import SampleUse, StageTask, prompt_of, question_of, sample_digest
from qzoom.training.stages import StageRecipe


@dataclass(frozen=True, slots=True)
class GateSample:
    """One question at one number of coarse tokens."""

    question: Question  # the record
    turn: int  # index of the turn
    tokens: int  # visual tokens of the coarse pass
    target: int  # 1 zoom, 0 coarse is enough


def gate_samples(stores: Sequence[RecordStore], strategy: Strategy, seed: int) -> list[GateSample]:
    """Questions to train on, each with coarse tokens and a target.

    Of answers by resolution, "consistency" takes transitions and as many easy questions; "prediction_vs_gt" (the
    ablation) draws as many questions from all of them. Of answers compared with zoomed ones, as many of either target
    are taken.
    """
    sweeps = [(store, sweep) for store in stores for _, sweep in store.of_kind(ResolutionSweep)]
    chosen = select_items([sweep for _, sweep in sweeps], seed)
    if strategy == "prediction_vs_gt":
        chosen = random.Random(seed).sample(range(len(sweeps)), len(chosen))
    samples = []
    for index in chosen:
        store, sweep = sweeps[index]
        target, tokens = draw_label(sweep, random.Random(f"{seed}/{sweep.question}/{sweep.turn}"), strategy)
        if target >= 0:
            samples.append(GateSample(question_of(store, sweep.question), sweep.turn, tokens, target))
    compared = [(store, comparison) for store in stores for _, comparison in store.of_kind(ZoomComparison)]
    labels = [zoom_label(comparison) for _, comparison in compared]
    for index in select_balanced(labels, seed):
        store, comparison = compared[index]
        question = question_of(store, comparison.question)
        samples.append(GateSample(question, comparison.turn, comparison.tokens, labels[index] or 0))
    return samples


class GateTask(StageTask):
    """Gate targets of one or more stores of gate labels.

    Raises:
        DataError: no question needs zooming, so there is nothing to learn.
    """

    def __init__(self, recipe: StageRecipe, engine: Engine) -> None:
        super().__init__(recipe, engine, "gate")
        self.samples = gate_samples(self.stores, recipe.strategy, recipe.seed)
        if not self.samples:
            reports = [gate_report(store.folder) for store in self.stores]
            counts = ", ".join(
                f"{sum(getattr(report, name) for report in reports)} {name}" for name in ("closer", "enough", "dropped")
            )
            raise DataError(
                f"No question of {', '.join(recipe.labels)} is wrong on coarse views and right on finer ones "
                f"({counts}); label more questions, or lower --tokens."
            )
        self.weights = [1] * len(self.samples)
        self.identity = sample_digest(repr([(s.question.values(), s.turn, s.tokens, s.target) for s in self.samples]))

    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Binary cross entropy, summed over the samples."""
        gate = engine.gate
        assert gate is not None
        backbone = engine.backbone
        chosen = [self.samples[use.index] for use in uses]

        def make(index: int) -> Prompt:
            sample, images = chosen[index], self.recipe.images
            ids = self.question_ids(sample.question, sample.turn)
            return prompt_of(engine, sample.question, ids, view="dynamic", tokens=sample.tokens, images=images)

        prompts, shared = self.shared_states(engine, [use.index for use in uses], make)
        positions = [prompt.positions for prompt in prompts]
        recompute = self.recipe.gradient_checkpointing
        hidden = run_stack(backbone, list(gate.layers), shared, positions, recompute=recompute)
        logits = gate.logit(torch.stack([states[-1] for states in hidden]))
        targets = torch.tensor([sample.target for sample in chosen], device=logits.device)
        return gate_loss(logits, targets) * len(chosen)
