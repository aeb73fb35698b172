"""The model's own answers to all questions about an image from one coarse pass, and the attention of those answers.

image --(square or own shape)--> one encoding --> one prefix --> each question's prompt, answer, keys and values
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from qzoom.config import TokenBudget
from qzoom.engine.attention import ResponseAttention, response_attention
from qzoom.engine.cache import KVCache
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import DecodeBatch, prefill
from qzoom.engine.perceive import Stopwatch
from qzoom.engine.prompt import VisualSpan
from qzoom.engine.request import Options, make_request
from qzoom.engine.session import prefill_prefix
from qzoom.engine.state import Engine, State
from qzoom.images.load import LoadedImage
from qzoom.labels.settings import View
from qzoom.model import QZoom
from qzoom.types import Answer, SamplingParams

PADDING = (127, 127, 127)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A picture as the model is to see it."""

    picture: LoadedImage  # padded to a square with grey, or as it was
    size_px: tuple[int, int]  # (width, height) before padding
    budget: TokenBudget  # visual tokens allowed; both limits are the same for a square
    view: View  # which of the two


def prepare_image(picture: LoadedImage, view: View, tokens: int) -> PreparedImage:
    """Prepare a picture: at most `tokens` visual tokens as it is, or exactly that many as a square (method.md 5.1)."""
    if view == "dynamic":
        return PreparedImage(picture, picture.size_px, TokenBudget(1, tokens), view)
    width, height = picture.size_px
    side = max(width, height)
    square = Image.new("RGB", (side, side), PADDING)
    square.paste(picture.image, ((side - width) // 2, (side - height) // 2))
    padded = dataclasses.replace(picture, image=square, size_px=(side, side))
    return PreparedImage(padded, picture.size_px, TokenBudget(tokens, tokens), view)


@dataclass(frozen=True, slots=True)
class Responses:
    """The answers to all questions about a picture."""

    states: tuple[State, ...]  # per question, the state after the shared layers
    texts: tuple[str, ...]  # the answers
    tokens: tuple[tuple[int, ...], ...]  # their ids, an end token included
    caches: tuple[KVCache, ...]  # keys and values of all layers for each prompt


@torch.inference_mode()
def generate(
    engine: Engine,
    chat: ChatEncoder,
    image: PreparedImage,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    system: str | None = None,
) -> Responses:
    """Answer greedily from the coarse pass alone, all questions as one batch, perhaps after a system turn
    (QuestionError, BudgetError, ImageError: as in `QZoom.ask`)."""
    options = Options(zoom="never", sampling=SamplingParams(max_new_tokens=max_new_tokens), coarse_tokens=image.budget)
    plain = dataclasses.replace(engine, gate=None, region=None)
    features = engine.backbone.encode([image.picture.image], [image.budget])
    prefix = prefill_prefix(plain, chat, features, system)
    requests = [
        dataclasses.replace(make_request(chat, image.picture, text, options, system=system), prefix=prefix)
        for text in questions
    ]
    clock = Stopwatch(engine.backbone.device)
    looks = coarse_pass(plain, requests, clock)
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
def attention_of(engine: Engine, responses: Responses, index: int, layers: Sequence[int]) -> ResponseAttention | None:
    """Attention of one answer: mean over the generated tokens that were fed back, which is all but the last one.

    None when there is none: the model ended its answer at once, or gave a single token and no end.
    """
    fed = responses.tokens[index][:-1]
    if not fed:
        return None
    return response_attention(engine.backbone, responses.states[index].prompt, responses.caches[index], fed, layers)[0]


def sink_cells(hidden: Tensor, span: VisualSpan, ratio: float = 3.0) -> Tensor:
    """(rows, columns) float32, 1 at cells whose hidden state has a norm above `ratio` times the picture's median.

    `hidden` (length, hidden) are the states of the prompt, e.g. H_K.
    """
    norms = hidden[span.start : span.stop].float().norm(dim=-1)
    return (norms > ratio * norms.median()).float().view(span.features.grid)


def answer_both_ways(
    model: QZoom,
    picture: LoadedImage,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    coarse_tokens: int,
    region_tokens: int | None = None,
) -> list[tuple[Answer, Answer]]:
    """Each question answered from the coarse pass alone, and with the region; without `region_tokens` in the
    checkpoint's budget (QuestionError, BudgetError, ImageError: as in `QZoom.ask`)."""
    batch = [(picture, question) for question in questions]
    region = None if region_tokens is None else TokenBudget(1, region_tokens)
    coarse, zoomed = (
        model.ask_batch(
            batch,
            zoom=zoom,
            max_new_tokens=max_new_tokens,
            coarse_tokens=TokenBudget(1, coarse_tokens),
            region_tokens=region,
        )
        for zoom in ("never", "always")
    )
    return list(zip(coarse, zoomed, strict=True))
