"""Which attention heads point at what the answer rests on: the authors' tables, and how head lists are written.

The tables are chosen by hand per backbone and kind of picture (method.md 5.1); a backbone is known by its sizes. For
any other, `labels.head_search` finds heads.

Find the heads that point, instead of choosing them by hand: every head of every layer is scored on drawn pictures
whose answer boxes are known (see `labels.heads`). Documents stand for text, scenes for natural pictures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from qzoom.backbones.base import Backbone
from qzoom.data.questions import load_picture, open_questions
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import ConfigError, DataError
from qzoom.labels.attention import HeadScore, rank_heads
from qzoom.labels.maps import cells_touched
from qzoom.labels.respond import View, attention_of, respond, show

__all__ = ["FoundHeads", "HeadSearch", "HeadSet", "Mode", "find_heads", "parse_heads", "published_heads"]


Mode = Literal["text", "natural"]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class HeadSet:
    """Heads of one kind of question.

    Args:
        pointing: (layer, head) pairs whose mean is the grounding map.
        sinks: (layer, head) pairs whose mean shows sinks; empty: sinks are found by hidden-state norm.
    """

    pointing: Pairs
    sinks: Pairs = ()


def parse_heads(text: str) -> Pairs:
    """Heads as "22:1,4 23:6,11" (layer, then its heads).

    Raises:
        ConfigError: written in another way.
    """
    pairs = []
    for part in text.split():
        if not re.fullmatch(r"\d{1,3}:\d{1,3}(,\d{1,3})*", part):
            raise ConfigError(f"{text!r} does not name heads; write LAYER:HEAD,HEAD such as '22:1,4 23:6,11'.")
        layer, heads = part.split(":")
        pairs += [(int(layer), int(head)) for head in heads.split(",")]
    if not pairs:
        raise ConfigError("No heads are named; write LAYER:HEAD,HEAD such as '22:1,4 23:6,11'.")
    return tuple(dict.fromkeys(pairs))


def published_heads(backbone: type[Backbone] | Backbone, hidden_size: int, layers: int, mode: Mode) -> HeadSet | None:
    """The heads that a family declares for a base of these sizes (`Backbone.label_heads`); None where it gives none.

    Args:
        backbone: the family.
        hidden_size: of the decoder.
        layers: of the decoder.
        mode: kind of question.
    """
    tables = backbone.label_heads.get((hidden_size, layers))
    if tables is None:
        return None
    pointing, sinks = tables[mode]
    return HeadSet(parse_heads(pointing), parse_heads(sinks) if sinks else ())


FIRST_SEED = 1_900_000_000
"""Drawn pictures from here on are for searching heads; label other ones."""


@dataclass(frozen=True, slots=True)
class HeadSearch:
    """How heads are searched.

    Args:
        pictures: how many drawn pictures.
        questions: most questions about each.
        count: how many heads to take.
        tokens: visual tokens of the look.
        max_new_tokens: longest answer.
        view: "dynamic" or "square", as the labels will be.
    """

    pictures: int = 40
    questions: int = 4
    count: int = 3
    tokens: int = 576
    max_new_tokens: int = 32
    view: View = "dynamic"


@dataclass(frozen=True, slots=True)
class FoundHeads:
    """What the search found.

    Args:
        heads: the best ones; sinks are left to the hidden-state norm.
        scores: of the best ones, best first.
        samples: answers that were scored.
    """

    heads: HeadSet
    scores: tuple[HeadScore, ...]
    samples: int


def find_heads(engine: Engine, mode: Mode, search: HeadSearch) -> FoundHeads:
    """The heads whose attention falls on known answer boxes most often.

    Raises:
        DataError: the model answered none of the questions.
    """
    kind = "documents" if mode == "text" else "scenes"
    asked = open_questions([f"{kind}:{FIRST_SEED}:{search.pictures}"], per_picture=search.questions, seed=1).questions
    chat = ChatEncoder(engine.backbone)
    every = range(engine.backbone.num_layers)
    samples = []
    for question in asked:
        shown = show(load_picture(question), search.view, search.tokens)
        turns = [turn for turn in question.turns if turn.boxes]
        if not turns:
            continue
        found = respond(engine, chat, shown, [t.question for t in turns], max_new_tokens=search.max_new_tokens)
        for index, turn in enumerate(turns):
            attention = attention_of(engine, found, index, every)
            if attention is not None:
                cells = cells_touched(turn.boxes, shown.size_px, attention.values.shape[2:], search.view)
                samples.append((attention, torch.as_tensor(cells)))
    if not samples:
        raise DataError(
            f"Heads cannot be found: the model gave no answer to {len(asked)} drawn pictures; name heads with --heads."
        )
    ranked = rank_heads(samples)[: search.count]
    return FoundHeads(HeadSet(tuple((s.layer, s.head) for s in ranked)), tuple(ranked), len(samples))
