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


_SIZES = {  # (family, hidden size, layers)
    ("qwen2_5_vl", 2048, 36): "Qwen2.5-VL-3B",
    ("qwen2_5_vl", 3584, 28): "Qwen2.5-VL-7B",
    ("qwen3_vl", 2560, 36): "Qwen3-VL-4B",
    ("qwen3_vl", 4096, 36): "Qwen3-VL-8B",
}
_TABLE: dict[tuple[str, Mode], tuple[str, str]] = {
    ("Qwen2.5-VL-3B", "text"): ("20:1,4 22:14", ""),
    ("Qwen2.5-VL-3B", "natural"): ("21:9,11 22:0,7", "8:1,13"),
    ("Qwen2.5-VL-7B", "text"): ("22:1,4 23:6,11", ""),
    ("Qwen2.5-VL-7B", "natural"): ("16:1,7,17 19:17,20", "9:4,22"),
    ("Qwen3-VL-4B", "text"): ("19:24,27 24:21,23", "24:6,10"),
    ("Qwen3-VL-4B", "natural"): ("20:15,21,23 21:8,10,11", "20:1,24"),
    ("Qwen3-VL-8B", "text"): ("19:24,26,27 24:21,22,23", "24:1,2"),
    ("Qwen3-VL-8B", "natural"): ("20:15,21,23 21:8,10,11", "21:7"),
}


def published_heads(family: str, hidden_size: int, layers: int, mode: Mode) -> HeadSet | None:
    """The authors' heads for a backbone of these sizes; None where they give none.

    Args:
        family: model type.
        hidden_size: of the decoder.
        layers: of the decoder.
        mode: kind of question.
    """
    name = _SIZES.get((family, hidden_size, layers))
    if name is None:
        return None
    pointing, sinks = _TABLE[name, mode]
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
