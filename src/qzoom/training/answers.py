"""Stage 2: the decoder learns to answer from the coarse view and the region together (docs/method.md 6).

The target is the answer that was right: for hard cases that of the coarse pass. The region is the branch's, or at times
random; if the branch proposes none, it is random.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qzoom.config import TokenBudget
from qzoom.data.questions import load_picture
from qzoom.engine.perceive import propose_boxes, region_maps
from qzoom.engine.prompt import Prompt, build_prompt
from qzoom.engine.state import Engine, State, advance_region, advance_shared
from qzoom.engine.zoom import RegionBlock, enlarged, insert_regions, read_tokens
from qzoom.errors import ConfigError, DataError
from qzoom.heads.boxes import CellBox, MapBox, map_box
from qzoom.images.geometry import box_area_px
from qzoom.labels.hard_cases import ZoomEffect, current_verdicts, zoom_effect
from qzoom.labels.respond import prepare_image
from qzoom.store.schema import Question, Verdict
from qzoom.training.forward import hidden_states
from qzoom.training.losses import IGNORE, answer_loss
from qzoom.training.samples import SampleUse, StageTask, question_of, sample_digest
from qzoom.training.stages import KINDS, StageRecipe


@dataclass(frozen=True, slots=True)
class AnswerSample:
    """One turn with its prompt and its target."""

    question: Question  # the record
    turn: int  # index of the turn
    kind: ZoomEffect  # what zooming changed
    ids: tuple[int, ...]  # of the prompt
    answer: tuple[int, ...]  # token ids of the target, the end token last


class AnswerTask(StageTask):
    """Turns of one or more label stores, mixed as the recipe says.

    Raises:
        DataError: no turn of the wanted kinds.
        ConfigError: hard cases are not among the wanted kinds, to which the mixture is relative.
    """

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
        tokens = rng.choice(recipe.tokens) if recipe.tokens else self._coarse_tokens()
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

    def _coarse_tokens(self) -> int:
        settings = self.stores[0].settings
        return int(settings.get("coarse_tokens", 576))

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
