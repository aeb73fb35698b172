"""Find the heads that point, instead of choosing them by hand: every head of every layer is scored on drawn pictures
whose answer boxes are known (see `labels.heads`). Documents stand for text, scenes for natural pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.state import Engine
from qzoom.errors import DataError
from qzoom.labels.heads import HeadScore, rank_heads
from qzoom.labels.presets import HeadSet, Mode
from qzoom.labels.respond import View, attention_of, respond, show
from qzoom.labels.tristate import cells_touched
from qzoom.records.questions import load_picture, open_questions

__all__ = ["FoundHeads", "HeadSearch", "find_heads"]

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
