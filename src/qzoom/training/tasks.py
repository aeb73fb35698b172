"""What each stage learns from, and its loss: label maps, right answers, gate targets.

Stages 1 and 2.5: the region branch learns ternary label maps (docs/method.md 5.4).

Stage 2: the decoder learns to answer from the coarse view and the region together (docs/method.md 6). The target is the
answer that was right: for hard cases that of the coarse pass. The region is the branch's, or at times random; if the
branch proposes none, it is random.

Stage 3: the gate learns when the coarse pass is enough (docs/method.md 2 and 8).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.config import TokenBudget
from qzoom.data.questions import load_picture
from qzoom.engine.perceive import propose_boxes, region_maps
from qzoom.engine.prompt import Prompt, build_prompt
from qzoom.engine.request import share_among_pages
from qzoom.engine.state import Engine, State, advance_region, advance_shared
from qzoom.engine.zoom import RegionBlock, enlarged, insert_regions, read_tokens
from qzoom.errors import ConfigError, DataError
from qzoom.heads.boxes import CellBox, MapBox, map_box
from qzoom.images.geometry import box_area_px
from qzoom.images.load import load_image
from qzoom.labels.gate import Strategy, draw_label, gate_report, select_balanced, select_items, zoom_label
from qzoom.labels.hard_cases import ZoomEffect, current_verdicts, zoom_effect
from qzoom.labels.respond import PreparedImage, prepare_image
from qzoom.store.records import RecordStore, Stored
from qzoom.store.schema import Question, RegionLabel, ResolutionSweep, Verdict, ZoomComparison
from qzoom.training.forward import hidden_states, region_logits_at, run_stack
from qzoom.training.losses import IGNORE, answer_loss, gate_loss, region_loss
from qzoom.training.samples import (
    SampleUse,
    StageTask,
    conversation_ids,
    prompt_of,
    question_of,
    sample_digest,
    shown_picture,
)
from qzoom.training.stages import KINDS, StageRecipe

_BLANK_SHARE = 1 / 3  # of the pictures beside a sample's own


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

    @property
    def picture(self) -> str:
        """Which picture it is about."""
        return f"{self.question.source} {self.question.image}"


@dataclass(frozen=True, slots=True)
class Beside:
    """Pictures shown with that of a sample in one question."""

    pictures: tuple[int | None, ...] = ()  # indices of their samples; None for a blank page
    place: int = 0  # how many of them come before the sample's own
    share: bool = False  # whether all share the tokens of one coarse view, as the pages of a PDF do


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
        self._asked: dict[str, set[str]] = {}
        for sample in self.samples:
            self._asked.setdefault(sample.picture, set()).update(turn.question for turn in sample.question.turns)
        names = [stored.id if stored else "-" for sample in self.samples for stored in sample.labels]
        self.identity = sample_digest(" ".join(names))

    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Binary cross entropy, summed over the valid cells. Among other pictures, a sample's mean over the cells of
        all its maps counts as often as the sample has valid cells of its own."""
        assert engine.region is not None
        backbone, recompute = engine.backbone, self.recipe.gradient_checkpointing
        chosen = [self.samples[use.index] for use in uses]
        beside = [self._beside(use) for use in uses]
        tokens = [self._tokens(sample, use) for sample, use in zip(chosen, uses, strict=True)]
        sequences = []
        for sample, others in zip(chosen, beside, strict=True):
            turns = [(turn.prompt, turn.text) for turn in sample.turns]
            sequence = conversation_ids(self.chat, turns, len(others.pictures) + 1)
            assert sequence is not None  # samples whose turns cannot share a sequence were taken apart
            sequences.append(sequence)

        def make(index: int) -> Prompt:
            pictures = self._encoded(engine, chosen[index], beside[index], tokens[index])
            return build_prompt(backbone, sequences[index][0], pictures)

        keys = [
            None if others.pictures else (use.index, count)
            for use, count, others in zip(uses, tokens, beside, strict=True)
        ]
        prompts, shared = self.shared_states(engine, keys, make)
        # one placeholder became many visual tokens
        asking = [
            [query + len(prompt) - len(ids) for query in queries]
            for prompt, (ids, queries) in zip(prompts, sequences, strict=True)
        ]
        layers = list(engine.region.layers)
        positions = [prompt.positions for prompt in prompts]
        hidden = run_stack(backbone, layers[:-1], shared, positions, recompute=recompute)
        total = torch.zeros((), device=backbone.device)
        for sample, others, prompt, queries, states in zip(chosen, beside, prompts, asking, hidden, strict=True):
            logits: list[Tensor] = []
            targets: list[Tensor] = []
            for stored, query in zip(sample.labels, queries, strict=True):
                if stored is None:
                    continue
                maps = [region_logits_at(engine, states, prompt, [query], i)[0] for i in range(len(prompt.spans))]
                labels = torch.as_tensor(sample.store.tensor(stored, "labels"), device=states.device).long()
                logits += maps
                targets += [labels if i == others.place else torch.zeros_like(m).long() for i, m in enumerate(maps)]
            # a mean over its maps, so that those of other pictures do not weigh on the other samples of a micro-batch
            total = total + region_loss(logits, targets, focal=self.recipe.region_loss == "focal") * sample.weight
        return total

    def _beside(self, use: SampleUse) -> Beside:
        """Other pictures for one use of a sample; none for most uses, as `other_pictures` says. Pictures of which the
        same is asked are left out: the question would mean them, too."""
        draw = random.Random(f"{self.recipe.seed}/beside/{use.index}/{use.epoch}")
        if draw.random() >= self.recipe.other_pictures:
            return Beside()
        asked = self._asked[self.samples[use.index].picture]
        pictures: list[int | None] = []
        for _ in range(draw.randint(1, 4)):
            other = draw.randrange(len(self.samples))
            if draw.random() < _BLANK_SHARE:
                pictures.append(None)
            elif not asked & self._asked[self.samples[other].picture]:
                pictures.append(other)
        return Beside(tuple(pictures), draw.randint(0, len(pictures)), draw.random() < 0.5)

    def _encoded(self, engine: Engine, sample: RegionSample, beside: Beside, tokens: int) -> list[VisualFeatures]:
        """The sample's picture in its place among the others."""
        if beside.share:
            tokens = share_among_pages(TokenBudget(1, tokens), len(beside.pictures) + 1).max_tokens

        def shown(one: RegionSample) -> PreparedImage:
            view, images = one.turns[0].view, self.recipe.images
            return shown_picture(engine, one.question, view=view, tokens=tokens, images=images)

        def blank() -> PreparedImage:
            size_px = sample.turns[0].size_px
            return prepare_image(load_image(Image.new("RGB", size_px, "white")), "dynamic", tokens)

        own = self.features(engine, (sample.picture, sample.turns[0].view, tokens), partial(shown, sample))
        others = [self.samples[i] if i is not None else None for i in beside.pictures]
        pictures = [
            self.features(engine, (other.picture, other.turns[0].view, tokens), partial(shown, other))
            if other is not None
            else self.features(engine, (sample.turns[0].size_px, tokens), blank)
            for other in others
        ]
        return [*pictures[: beside.place], own, *pictures[beside.place :]]

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


@dataclass(frozen=True, slots=True)
class AnswerSample:
    """One turn with its prompt and its target."""

    question: Question  # the record
    turn: int  # index of the turn
    kind: ZoomEffect  # what zooming changed
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...]  # token ids of the target, the end token last


class AnswerTask(StageTask):
    """Turns of one or more label stores, mixed as the recipe says (DataError: no turn of the wanted kinds; ConfigError:
    hard cases are not among the wanted kinds, to which the mixture is relative)."""

    def __init__(self, recipe: StageRecipe, engine: Engine) -> None:
        super().__init__(recipe, engine, "mine")
        kinds: dict[ZoomEffect, list[tuple[Question, Verdict]]] = {}
        for store in self.stores:
            for verdict in current_verdicts(store):
                question = question_of(store, verdict.question)
                kinds.setdefault(zoom_effect(verdict), []).append((question, verdict))
        self.samples = [self._sample(engine, *pair) for pair in _mixed(kinds, recipe)]
        if not self.samples:
            counts = ", ".join(f"{len(items)} {kind}" for kind, items in kinds.items()) or "nothing"
            raise DataError(f"No hard cases in {', '.join(recipe.labels)} ({counts}); mine more questions.")
        self.weights = [len(sample.answer) for sample in self.samples]
        self.identity = sample_digest(repr([(s.question.values(), s.turn, s.answer) for s in self.samples]))

    def loss(self, engine: Engine, uses: Sequence[SampleUse]) -> Tensor:
        """Cross entropy, summed over the answer tokens."""
        backbone, recompute = engine.backbone, self.recipe.gradient_checkpointing
        chosen = [self.samples[use.index] for use in uses]
        prompts = [self._prompt(engine, sample, use) for sample, use in zip(chosen, uses, strict=True)]
        hidden = hidden_states(backbone, prompts, backbone.num_layers, recompute=recompute)
        total = torch.zeros((), device=backbone.device)
        for sample, states in zip(chosen, hidden, strict=True):
            count = len(sample.answer)
            logits = backbone.lm_logits(states[-count - 1 :])
            labels = torch.tensor([IGNORE, *sample.answer], device=logits.device)
            total = total + answer_loss(logits, labels) * count
        return total

    @torch.no_grad()
    def _prompt(self, engine: Engine, sample: AnswerSample, use: SampleUse) -> Prompt:
        """Coarse view, region, question and answer."""
        recipe, backbone = self.recipe, engine.backbone
        rng = random.Random(f"{recipe.seed}/region/{use.index}/{use.epoch}")
        tokens = rng.choice(recipe.tokens or (int(self.stores[0].settings.get("coarse_tokens", 576)),))
        picture = load_picture(sample.question, Path(recipe.images) if recipe.images else None)
        image = prepare_image(picture, "dynamic", tokens)
        features = backbone.encode([image.picture.image], [image.budget])
        prompt = build_prompt(backbone, sample.ids, features)
        found = self._region(engine, prompt, picture.size_px, rng)
        budget = enlarged(backbone, found, TokenBudget(1, recipe.region_tokens), engine.config.box)
        crop = backbone.encode([backbone.crop(picture.image, found.box)], [budget])[0]
        whole = build_prompt(backbone, [*sample.ids, *sample.answer], features)
        block = RegionBlock(0, found.cells, read_tokens(crop, found, engine.config))
        return insert_regions(backbone, whole, [block], engine.config)[0]

    def _region(self, engine: Engine, prompt: Prompt, size_px: tuple[int, int], rng: random.Random) -> MapBox:
        recipe, config = self.recipe, engine.config
        if rng.random() >= recipe.random_box:
            (state,) = advance_region(engine, advance_shared(engine, [State.empty(engine, prompt)]))
            boxes = propose_boxes(engine, region_maps(engine, state), [size_px])
            if boxes:
                return boxes[0]
        grid = prompt.spans[0].features.grid
        rule = dataclasses.replace(config.box, margin_cells=0.0)
        place = {"token_px": engine.backbone.token_px, "padded": engine.backbone.square_padding is not None}
        for _ in range(20):  # in a padded picture the box may show nothing
            cells = random_cells(grid, recipe.random_side, rng)
            box = map_box(cells, grid, size_px, rule=rule, **place)  # type: ignore[arg-type]
            if box_area_px(box.box):
                return box
        return map_box((0, 0, grid[1], grid[0]), grid, size_px, rule=rule, **place)  # type: ignore[arg-type]

    def _sample(self, engine: Engine, question: Question, verdict: Verdict) -> AnswerSample:
        kind, ids = zoom_effect(verdict), self.question_ids(question, verdict.turn)
        text = verdict.zoomed if kind == "improvements" else verdict.coarse
        answer = engine.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
        return AnswerSample(question, verdict.turn, kind, tuple(ids), (*answer, engine.backbone.eos_ids[0]))


def random_cells(grid: tuple[int, int], side: tuple[float, float], rng: random.Random) -> CellBox:
    """A random box in whole cells: each side a share of the grid's, drawn evenly from `side`, at least one cell."""
    rows, columns = grid
    height = min(rows, max(1, math.floor(rng.uniform(*side) * rows + 0.5)))
    width = min(columns, max(1, math.floor(rng.uniform(*side) * columns + 0.5)))
    y0, x0 = rng.randint(0, rows - height), rng.randint(0, columns - width)
    return float(x0), float(y0), float(x0 + width), float(y0 + height)


def _mixed(
    found: dict[ZoomEffect, list[tuple[Question, Verdict]]], recipe: StageRecipe
) -> list[tuple[Question, Verdict]]:
    """All hard cases, and of the other kinds as many per hard case as the mixture says, in the order of `KINDS`."""
    if not recipe.mixture.get("hard"):
        raise ConfigError("mixture must name hard cases, to which the other shares are relative.")
    out: list[tuple[Question, Verdict]] = []
    hard = len(found.get("hard", []))
    rng = random.Random(recipe.seed)
    for kind, share in ((kind, recipe.mixture[kind]) for kind in KINDS if kind in recipe.mixture):
        items = found.get(kind, [])  # type: ignore[call-overload]
        count = len(items) if kind == "hard" else min(len(items), round(share * hard))
        out += items if count == len(items) else rng.sample(items, count)
    return out


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
    """Gate targets of one or more stores of gate labels (DataError: no question needs zooming, so there is nothing to
    learn)."""

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
            shown = shown_picture(engine, sample.question, view="dynamic", tokens=sample.tokens, images=images)
            return prompt_of(engine, ids, [shown])

        prompts, shared = self.shared_states(engine, [use.index for use in uses], make)
        positions = [prompt.positions for prompt in prompts]
        recompute = self.recipe.gradient_checkpointing
        hidden = run_stack(backbone, list(gate.layers), shared, positions, recompute=recompute)
        logits = gate.logit(torch.stack([states[-1] for states in hidden]))
        targets = torch.tensor([sample.target for sample in chosen], device=logits.device)
        return gate_loss(logits, targets) * len(chosen)
