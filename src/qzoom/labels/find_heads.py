"""Which attention heads show the evidence of an answer: given ones, the authors' tables, or heads found by a search.

The search scores every head of every layer on synthetic images whose answer boxes are known: documents for text, scenes
for natural images (docs/method.md 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.data.cells import cells_touched
from qzoom.data.questions import load_picture, open_questions
from qzoom.engine.attention import ResponseAttention
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.labels.respond import attention_of, generate, prepare_image
from qzoom.labels.settings import Pairs, RegionRecipe, parse_heads

Mode = Literal["text", "natural"]


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads of one kind of question."""

    pointing: Pairs  # (layer, head) pairs whose mean is the grounding map
    sinks: Pairs = ()  # (layer, head) pairs whose mean shows sinks; empty: sinks are found by hidden-state norm


def published_heads(backbone: type[Backbone] | Backbone, hidden_size: int, layers: int, mode: Mode) -> HeadSet | None:
    """The heads that a family declares for a decoder of these sizes (`Backbone.label_heads`); None without a table."""
    tables = backbone.label_heads.get((hidden_size, layers))
    if tables is None:
        return None
    pointing, sinks = tables[mode]
    return HeadSet(parse_heads(pointing), parse_heads(sinks) if sinks else ())


FIRST_SEED = 1_900_000_000
"""Synthetic pictures from here on are for searching heads; label other ones."""


@dataclass(frozen=True, slots=True)
class HeadScore:
    """How well one head points."""

    layer: int  # index of the decoder layer
    head: int  # index of the query head
    hit: float  # share of questions whose highest cell touches an answer box
    lift: float  # share of the head's visual attention inside the boxes, divided by the boxes' share of the cells


def rank_heads(samples: Sequence[tuple[ResponseAttention, Tensor]]) -> list[HeadScore]:
    """Score every head, best first, by responses' attention and the (rows, columns) bool cells of their answers."""
    if not samples:
        raise ValueError("Heads cannot be ranked without samples.")
    layers, heads = samples[0][0].layers, samples[0][0].values.shape[1]
    hits = torch.zeros(len(layers), heads)
    lifts = torch.zeros(len(layers), heads)
    for attention, cells in samples:
        flat = attention.values.flatten(2)
        inside = cells.flatten()
        hits += inside[flat.argmax(-1)].float()
        share = (flat * inside).sum(-1) / flat.sum(-1).clamp_min(1e-12)
        lifts += share / inside.float().mean().clamp_min(1e-12)
    scores = [
        HeadScore(layer, head, float(hits[i, head]) / len(samples), float(lifts[i, head]) / len(samples))
        for i, layer in enumerate(layers)
        for head in range(heads)
    ]
    return sorted(scores, key=lambda s: (-s.hit, -s.lift, s.layer, s.head))


def find_heads(engine: Engine, mode: Mode, recipe: RegionRecipe) -> tuple[list[HeadScore], int]:
    """The heads whose attention falls on known answer boxes most often, best first, and the number of scored answers
    (DataError: the model answered none of the questions)."""
    search = recipe.search
    kind = "documents" if mode == "text" else "scenes"
    names = [f"{kind}:{FIRST_SEED}:{search.pictures}"]
    questions = open_questions(names, per_picture=search.questions, seed=1)[0]
    chat = ChatEncoder(engine.backbone)
    samples = []
    for question in questions:
        image = prepare_image(load_picture(question), recipe.view, recipe.tokens)
        turns = [turn for turn in question.turns if turn.boxes]
        if not turns:
            continue
        texts = [turn.question for turn in turns]
        responses = generate(engine, chat, image, texts, max_new_tokens=min(32, recipe.max_new_tokens))
        for index, turn in enumerate(turns):
            attention = attention_of(engine, responses, index, engine.backbone.attention_layers)
            if attention is not None:
                view = engine.backbone.map_view(recipe.view)
                cells = cells_touched(turn.boxes, image.size_px, attention.values.shape[2:], view)
                samples.append((attention, torch.as_tensor(cells)))
    if not samples:
        raise DataError(
            f"Heads cannot be found: the model gave no answer to {len(questions)} synthetic pictures; name heads with "
            "--heads."
        )
    return rank_heads(samples)[: search.count], len(samples)


def choose_heads(
    engine: Engine, modes: Sequence[Mode], recipe: RegionRecipe
) -> tuple[dict[Mode, HeadSet], dict[str, Any]]:
    """The heads of a recipe for the modes that occur, and the scores of those that were found, as JSON values
    (ConfigError: heads that the model does not have, or no table for it)."""
    backbone = engine.backbone
    sinks = parse_heads(recipe.sink_heads) if recipe.sink_heads else ()
    chosen: dict[Mode, HeadSet] = {}
    facts: dict[str, Any] = {}
    for mode in modes:
        if recipe.heads == "auto":
            scores, samples = find_heads(engine, mode, recipe)
            chosen[mode] = HeadSet(tuple((score.layer, score.head) for score in scores), sinks)
            facts[mode] = {"samples": samples, "scores": [asdict(score) for score in scores]}
        elif recipe.heads == "preset":
            preset = published_heads(backbone, backbone.hidden_size, backbone.num_layers, mode)
            if preset is None:
                raise ConfigError(
                    f"There is no table of heads for a {backbone.family} of {backbone.num_layers} layers and width "
                    f"{backbone.hidden_size}; use --heads auto, or name them."
                )
            chosen[mode] = dataclasses.replace(preset, sinks=sinks or preset.sinks)
        else:
            chosen[mode] = HeadSet(parse_heads(recipe.heads), sinks)
        _check_heads(engine, chosen[mode])
    return chosen, facts


def _check_heads(engine: Engine, heads: HeadSet) -> None:
    layers, count = engine.backbone.num_layers, int(engine.backbone.text_config.num_attention_heads)
    for layer, head in (*heads.pointing, *heads.sinks):
        if layer >= layers or head >= count:
            raise ConfigError(f"Head {layer}:{head} does not exist; the model has {layers} layers of {count} heads.")
        if layer not in engine.backbone.attention_layers:
            usable = ", ".join(map(str, engine.backbone.attention_layers))
            raise ConfigError(f"Layer {layer} has linear attention and so no heads that point; choose from {usable}.")
