"""Labels for both branches from the model's own answers (method.md 5 and 8), with the states that they train on.

Region: the model answers at the teacher's resolution, the attention of that answer becomes a tri-state map, and the
branch learns it on coarser looks. Gate: the question climbs a ladder of resolutions and the consistency rules decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.config import TokenBudget
from qzoom.engine.attention import ResponseAttention, response_attention
from qzoom.engine.batch import prefill
from qzoom.engine.cache import KVCache
from qzoom.engine.chat import ChatEncoder
from qzoom.engine.generate import DecodeBatch, Stopwatch
from qzoom.engine.perceive import look
from qzoom.engine.request import Options, Request, make_request
from qzoom.engine.session import prefill_prefix
from qzoom.engine.state import Engine, State
from qzoom.labels.attention import cells_of_boxes, sink_cells
from qzoom.labels.maps import RegionLabelSettings, region_labels
from qzoom.training.heads_data import LabelPicture
from qzoom.training.heads_recipe import HeadsRecipe
from qzoom.types import SamplingParams

__all__ = ["AnsweredPicture", "answer_picture", "known_box_labels", "own_labels", "response_maps", "student_states"]

ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class AnsweredPicture:
    """All questions of a picture answered from one plain look.

    Args:
        states: per question, the state after the shared layers (its prompt, H_K).
        texts: the answers.
        tokens: their ids.
        caches: keys and values of all layers for each prompt.
    """

    states: tuple[State, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    caches: tuple[KVCache, ...]


@torch.inference_mode()
def answer_picture(engine: Engine, chat: ChatEncoder, item: LabelPicture, tokens: int) -> AnsweredPicture:
    """Answer a picture's questions greedily from a plain look of at most `tokens` visual tokens."""
    options = Options(
        zoom="never", sampling=SamplingParams(max_new_tokens=ANSWER_TOKENS), coarse_tokens=TokenBudget(1, tokens)
    )
    features = engine.backbone.encode([item.picture.image], [options.coarse_tokens])
    plain = dataclasses.replace(engine, gate=None, region=None)
    prefix = prefill_prefix(plain, chat, features, None)
    requests = [_request(chat, item, q.question, options, prefix) for q in item.questions]
    looks = look(plain, requests, Stopwatch(engine.backbone.device))
    rows = prefill(plain, looks, Stopwatch(engine.backbone.device))
    caches = tuple(row.cache for row in rows)
    batch = DecodeBatch(engine.backbone)
    batch.start(rows)
    while batch.rows:
        batch.step()
    return AnsweredPicture(
        states=tuple(item.state for item in looks),
        texts=tuple(row.stream.text.strip() for row in rows),
        tokens=tuple(tuple(row.tokens) for row in rows),
        caches=caches,
    )


def _request(chat: ChatEncoder, item: LabelPicture, question: str, options: Options, prefix: State) -> Request:
    return dataclasses.replace(make_request(chat, item.picture, question, options), prefix=prefix)


@torch.inference_mode()
def response_maps(
    engine: Engine, answered: AnsweredPicture, index: int, layers: Sequence[int]
) -> ResponseAttention | None:
    """Attention of one answer; None when it is empty. All its tokens but end tokens are fed back."""
    eos = engine.backbone.eos_ids
    fed = [t for t in answered.tokens[index] if t not in eos]
    if not fed:
        return None
    prompt = answered.states[index].prompt
    return response_attention(engine.backbone, prompt, answered.caches[index], fed, layers)[0]


def own_labels(
    engine: Engine, answered: AnsweredPicture, index: int, heads: Sequence[tuple[int, int]], recipe: HeadsRecipe
) -> Tensor | None:
    """Tri-state labels (rows, columns) from the attention of the model's own answer; None when it gave none."""
    attention = response_maps(engine, answered, index, sorted({layer for layer, _ in heads}))
    if attention is None:
        return None
    state = answered.states[index]
    span = state.prompt.spans[0]
    settings = RegionLabelSettings(foreground=recipe.foreground, background=recipe.background)
    sinks = sink_cells(state.hidden, span, recipe.sink_ratio).cpu().numpy()
    return torch.as_tensor(region_labels(sinks, attention.mean_of(heads).cpu().numpy(), settings).labels)


def known_box_labels(item: LabelPicture, index: int, grid: tuple[int, int]) -> Tensor | None:
    """Labels (rows, columns) from the known answer boxes: touched cells 1, their neighbours ignored, the rest 0.

    None without boxes, or when they touch half of the map or more, as for maps from attention.
    """
    inside = cells_of_boxes(item.questions[index].boxes, item.picture.size_px, grid).float()
    if not 0 < float(inside.mean()) < 0.5:
        return None
    near = torch.nn.functional.max_pool2d(inside[None], 3, stride=1, padding=1)[0]
    labels = torch.zeros(grid, dtype=torch.long)
    labels[near > 0] = -100
    labels[inside > 0] = 1
    return labels


@torch.inference_mode()
def student_states(engine: Engine, chat: ChatEncoder, item: LabelPicture, tokens: int) -> list[State]:
    """H_K of every question of a picture on a coarse look of at most `tokens` visual tokens."""
    options = Options(zoom="never", coarse_tokens=TokenBudget(1, tokens))
    features = engine.backbone.encode([item.picture.image], [options.coarse_tokens])
    plain = dataclasses.replace(engine, gate=None, region=None)
    prefix = prefill_prefix(plain, chat, features, None)
    requests = [_request(chat, item, q.question, options, prefix) for q in item.questions]
    return [found.state for found in look(plain, requests, Stopwatch(engine.backbone.device))]
