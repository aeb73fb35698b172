"""The model's own answers to all questions about a picture from one coarse look, and where they look.

picture --(square or as it is)--> one encoding --> one prefix --> each question's prompt, answer and kept keys
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qzoom.config import TokenBudget
from qzoom.engine.attention import ResponseAttention, response_attention
from qzoom.engine.batch import prefill
from qzoom.engine.cache import KVCache
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.generate import DecodeBatch, Stopwatch
from qzoom.engine.perceive import look
from qzoom.engine.request import Options, make_request
from qzoom.engine.session import prefill_prefix
from qzoom.engine.state import Engine, State
from qzoom.images.load import LoadedImage
from qzoom.types import SamplingParams

__all__ = ["PADDING", "Responses", "Shown", "View", "attention_of", "respond", "show"]

View = Literal["dynamic", "square"]
PADDING = (127, 127, 127)


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as the model is to see it.

    Args:
        picture: padded to a square with grey, or as it was.
        size_px: (width, height) before padding.
        budget: visual tokens allowed; both limits are the same for a square.
        view: which of the two.
    """

    picture: LoadedImage
    size_px: tuple[int, int]
    budget: TokenBudget
    view: View


def show(picture: LoadedImage, view: View, tokens: int) -> Shown:
    """Prepare a picture: at most `tokens` visual tokens as it is, or exactly that many as a square (method.md 5.1)."""
    if view == "dynamic":
        return Shown(picture, picture.size_px, TokenBudget(1, tokens), view)
    from PIL import Image

    width, height = picture.size_px
    side = max(width, height)
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(picture.image, ((side - width) // 2, (side - height) // 2))
    padded = dataclasses.replace(picture, image=square, size_px=(side, side))
    return Shown(padded, picture.size_px, TokenBudget(tokens, tokens), view)


@dataclass(frozen=True, slots=True)
class Responses:
    """All questions of a picture answered.

    Args:
        states: per question, the state after the shared layers.
        texts: the answers.
        tokens: their ids, an end token included.
        caches: keys and values of all layers for each prompt.
    """

    states: tuple[State, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    caches: tuple[KVCache, ...]


@torch.inference_mode()
def respond(
    engine: Engine,
    chat: ChatEncoder,
    shown: Shown,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    system: str | None = None,
) -> Responses:
    """Answer greedily from the plain look, all questions as one batch.

    Args:
        engine: its branches are not used.
        chat: of its backbone.
        shown: the picture.
        questions: one or more texts.
        max_new_tokens: longest answer.
        system: a system turn to put first.

    Raises:
        QuestionError, BudgetError, ImageError: as in `QZoom.ask`.
    """
    options = Options(zoom="never", sampling=SamplingParams(max_new_tokens=max_new_tokens), coarse_tokens=shown.budget)
    plain = dataclasses.replace(engine, gate=None, region=None)
    features = engine.backbone.encode([shown.picture.image], [shown.budget])
    prefix = prefill_prefix(plain, chat, features, system)
    requests = [
        dataclasses.replace(make_request(chat, shown.picture, text, options, system=system), prefix=prefix)
        for text in questions
    ]
    clock = Stopwatch(engine.backbone.device)
    looks = look(plain, requests, clock)
    rows = prefill(plain, looks, clock)
    caches = tuple(row.cache for row in rows)
    batch = DecodeBatch(engine.backbone)
    batch.start(rows)
    while batch.rows:
        batch.step()
    return Responses(
        states=tuple(item.state for item in looks),
        texts=tuple(row.stream.text.strip() for row in rows),
        tokens=tuple(tuple(row.tokens) for row in rows),
        caches=caches,
    )


@torch.inference_mode()
def attention_of(engine: Engine, found: Responses, index: int, layers: Sequence[int]) -> ResponseAttention | None:
    """Attention of one answer: mean over the generated tokens that were fed back, which is all but the last one.

    None when there is none: the model ended its answer at once, or said one token only and no end.
    """
    fed = found.tokens[index][:-1]
    if not fed:
        return None
    return response_attention(engine.backbone, found.states[index].prompt, found.caches[index], fed, layers)[0]
