"""The steps between the look and the decoding, and the records of what came out (method.md 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from qzoom.backbones.base import VisualFeatures
from qzoom.engine.crops import Crop, encode_crops
from qzoom.engine.decode import DecodeRow
from qzoom.engine.fit import check_length, fit_regions
from qzoom.engine.fuse import RegionBlock, insert_regions
from qzoom.engine.look import Look, look
from qzoom.engine.recent import Recent
from qzoom.engine.request import Request
from qzoom.engine.sampling import Sampler
from qzoom.engine.state import Engine, State, advance_shared, advance_upper, truncate
from qzoom.engine.text import TextStream
from qzoom.engine.timing import Stopwatch
from qzoom.types import Answer, HeatMap, Perception, Region, Usage

__all__ = ["make_answer", "make_perception", "perceive", "prefill", "read_regions"]


def perceive(engine: Engine, requests: Sequence[Request]) -> list[Perception]:
    """Gate and regions of every request, without an answer."""
    clock = Stopwatch(engine.backbone.device)
    looks = look(engine, requests, clock, perceive=True)
    return [make_perception(engine, item, clock) for item in looks]


@torch.inference_mode()
def read_regions(
    engine: Engine,
    looks: Sequence[Look],
    clock: Stopwatch,
    prefixes: Sequence[bytes] = (),
    kept: Recent[VisualFeatures] | None = None,
) -> tuple[list[Look], list[tuple[Region, ...]]]:
    """Crop, encode and insert the regions of the looks that zoom; the shared layers run over what is new.

    Args:
        engine: backbone and arithmetic.
        looks: one or more.
        clock: gets "region_vision" and "region_layers".
        prefixes: `prefix_key` of every look, where regions may be kept.
        kept: features of regions that were read before (see `encode_crops`).

    Returns:
        The looks with their new states, and what was read for each.

    Raises:
        QuestionError: with one region of the fewest tokens allowed the prompt is longer than the model reads.
    """
    out, regions = list(looks), [tuple[Region, ...]() for _ in looks]
    chosen = [i for i, item in enumerate(looks) if item.gate.zoomed]
    if not chosen:
        return out, regions
    crops: list[Crop] = []
    for i in chosen:
        item = looks[i]
        boxes, budgets = fit_regions(engine, item.request, len(item.state.prompt), item.boxes)
        out[i] = dataclasses.replace(item, boxes=boxes)
        prefix = prefixes[i] if prefixes else b""
        pictures = item.request.pictures
        crops += [
            Crop(pictures[b.image].image, b.image, b.box, own, prefix) for b, own in zip(boxes, budgets, strict=True)
        ]
    with clock.step("region_vision"):
        features = iter(encode_crops(engine.backbone, crops, kept))
    states = []
    for i in chosen:
        item = out[i]
        blocks = [RegionBlock(b.image, b.cells, next(features)) for b in item.boxes]
        prompt, reused = insert_regions(engine.backbone, item.state.prompt, blocks, engine.config)
        check_length(len(prompt), item.request, engine.backbone)
        states.append(truncate(item.state, reused).on(prompt))
        regions[i] = tuple(
            Region(b.box, b.score, b.image, block.features.size_px, block.features.tokens.shape[0])
            for b, block in zip(item.boxes, blocks, strict=True)
        )
    with clock.step("region_layers"):
        for i, state in zip(chosen, advance_shared(engine, states), strict=True):
            out[i] = dataclasses.replace(out[i], state=state)
    return out, regions


@torch.inference_mode()
def prefill(engine: Engine, looks: Sequence[Look], clock: Stopwatch) -> list[DecodeRow]:
    """Layers K..N-1; zoomed and plain prompts run as two batches, since their lengths differ most.

    Returns:
        One row per look, keyed by its index, ready for a `DecodeBatch`.
    """
    found: dict[int, tuple[State, Tensor]] = {}
    with clock.step("upper_layers"):
        for zoomed in (False, True):
            group = [i for i, item in enumerate(looks) if item.gate.zoomed == zoomed]
            if group:
                states, logits = advance_upper(engine, [looks[i].state for i in group])
                found |= dict(zip(group, zip(states, logits, strict=True), strict=True))
    rows = []
    for i, item in enumerate(looks):
        state, first_logits = found[i]
        params = item.request.options.sampling
        rows.append(
            DecodeRow(
                key=i,
                cache=state.shared.cache.merged(state.upper.cache),
                length=len(state.prompt),
                position=state.prompt.next_position,
                logits=first_logits,
                params=params,
                sampler=Sampler(params),
                stream=TextStream(engine.backbone.tokenizer, params.stop),
            )
        )
    return rows


def _usage(engine: Engine, item: Look, regions: Sequence[Region], completion: int) -> Usage:
    spans = item.state.prompt.spans
    opening = len(engine.backbone.block_ids[0])
    prefix = item.request.prefix
    return Usage(
        coarse_tokens=sum(s.stop - s.start for s in spans if s.role == "coarse"),
        region_tokens=sum(r.tokens for r in regions),
        prompt_tokens=len(item.state.prompt),
        completion_tokens=completion,
        reused_tokens=_reused(item, prefix, opening) if prefix is not None else 0,
    )


def _reused(item: Look, prefix: State, opening: int) -> int:
    """Tokens of the session's prefix that came before the first inserted region and its `opening` tokens."""
    inserted = [s.start - opening for s in item.state.prompt.spans if s.role == "region"]
    return min([prefix.shared.length, *inserted])


def _heat_maps(item: Look) -> tuple[HeatMap, ...]:
    return tuple(HeatMap(m.blurred.cpu().numpy(), i) for i, m in enumerate(item.maps))


def make_perception(engine: Engine, item: Look, clock: Stopwatch) -> Perception:
    """The record of a look."""
    return Perception(
        gate=item.gate,
        regions=tuple(Region(b.box, b.score, b.image) for b in item.boxes),
        heat_maps=_heat_maps(item),
        image_sizes_px=tuple(p.size_px for p in item.request.pictures),
        usage=_usage(engine, item, (), 0),
        timing_ms=clock.snapshot(),
    )


def make_answer(engine: Engine, item: Look, regions: tuple[Region, ...], row: DecodeRow, clock: Stopwatch) -> Answer:
    """The record of a decoded row."""
    return Answer(
        text=row.stream.text,
        tokens=tuple(row.tokens),
        gate=item.gate,
        regions=regions,
        heat_maps=_heat_maps(item),
        usage=_usage(engine, item, regions, len(row.tokens)),
        timing_ms=clock.snapshot(),
        image_sizes_px=tuple(p.size_px for p in item.request.pictures),
        notes=tuple(note for p in item.request.pictures for note in p.notes),
        finish_reason=row.finish or "stop",
        question=item.request.conversation.question,
        cell_px=engine.backbone.cell_px,
        images=tuple(p.image for p in item.request.pictures),
    )
