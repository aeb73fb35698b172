"""The zoom: crop the regions, encode them, and insert their visual tokens after their picture (docs/method.md 4).

before:  [system] <start> coarse <end> [question]
after:   [system] <start> coarse <end> <start> region <end> [question]
          ~~~~~~ computed already ~~~~~ ~~~~~~~~~ to be run ~~~~~~~~~~

The visual tokens of a region that was read a moment ago come from memory. Positions are stock ones or aligned with the
coarse cells that a region covers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from qzoom.backbones.base import Backbone, VisualFeatures
from qzoom.config import BoxRule, TokenBudget, ZoomConfig
from qzoom.engine.cache import LRUCache
from qzoom.engine.perceive import CoarseResult, Stopwatch, make_region
from qzoom.engine.prompt import Prompt, VisualSpan
from qzoom.engine.request import check_length, fit_regions
from qzoom.engine.state import Engine, advance_shared, truncate
from qzoom.errors import ConfigError
from qzoom.heads.boxes import MapBox, bounds, foreground_tokens
from qzoom.types import Box, Region


@torch.inference_mode()
def zoom(
    engine: Engine,
    coarse: Sequence[CoarseResult],
    clock: Stopwatch,
    *,
    prefixes: Sequence[bytes] = (),
    cache: LRUCache[VisualFeatures] | None = None,
) -> tuple[list[CoarseResult], list[tuple[Region, ...]]]:
    """Crop, encode and insert the regions of the requests that zoom; the shared layers run over what is new.

    Args:
        prefixes: `prefix_key` of every request, where regions may be cached.
        cache: features of regions that were read before (see `encode_crops`).

    Returns:
        The results with their new states, and what was read for each.

    Raises:
        QuestionError: with one region of the fewest tokens allowed the prompt is longer than the model reads.
    """
    out, regions = list(coarse), [tuple[Region, ...]() for _ in coarse]
    chosen = [i for i, item in enumerate(coarse) if item.gate.zoomed]
    if not chosen:
        return out, regions
    crops: list[Crop] = []
    for i in chosen:
        item = coarse[i]
        boxes, budgets = fit_regions(engine, item.request, len(item.state.prompt), item.boxes)
        out[i] = dataclasses.replace(item, boxes=boxes)
        prefix = prefixes[i] if prefixes else b""
        pictures = item.request.pictures
        budgets = [enlarged(engine.backbone, b, own, engine.config.box) for b, own in zip(boxes, budgets, strict=True)]
        crops += [
            Crop(pictures[b.image].image, b.image, b.box, own, prefix) for b, own in zip(boxes, budgets, strict=True)
        ]
    with clock.step("region_vision"):
        features = iter(encode_crops(engine.backbone, crops, cache))
    states = []
    for i in chosen:
        item = out[i]
        blocks = [RegionBlock(b.image, b.cells, read_tokens(next(features), b, engine.config)) for b in item.boxes]
        prompt, reused = insert_regions(engine.backbone, item.state.prompt, blocks, engine.config)
        check_length(len(prompt), item.request, engine.backbone)
        states.append(truncate(item.state, reused).on(prompt))
        regions[i] = tuple(
            make_region(item.request, b, block.features) for b, block in zip(item.boxes, blocks, strict=True)
        )
    with clock.step("region_layers"):
        for i, state in zip(chosen, advance_shared(engine, states), strict=True):
            out[i] = dataclasses.replace(out[i], state=state)
    return out, regions


@dataclass(frozen=True, slots=True)
class Crop:
    """A region to be encoded."""

    picture: PIL.Image.Image  # the whole picture, RGB
    number: int  # which of its conversation's pictures it is
    box: Box  # xyxy in original pixels, half-open
    budget: TokenBudget  # limits on its visual tokens
    prefix: bytes = b""  # `prefix_key` of the conversation; b"" caches nothing

    @property
    def key(self) -> bytes:
        """What decides the features; b"" without a prefix."""
        facts = json.dumps([self.number, self.box, self.budget.min_tokens, self.budget.max_tokens])
        return hashlib.sha256(self.prefix + facts.encode()).digest() if self.prefix else b""


def encode_crops(
    backbone: Backbone, crops: Sequence[Crop], cache: LRUCache[VisualFeatures] | None = None
) -> list[VisualFeatures]:
    """Features of every region; those that are not cached are cut out and encoded in one call, equal ones once.
    `cache`: features of earlier regions, which gets the new ones; None caches none."""
    keys = [crop.key if cache is not None else b"" for crop in crops]
    out = [cache.get(key) if cache is not None and key else None for key in keys]
    first: dict[bytes, int] = {}
    missing = [i for i, features in enumerate(out) if features is None]
    new = [i for i in missing if not keys[i] or first.setdefault(keys[i], i) == i]
    pictures = [backbone.crop(crops[i].picture, crops[i].box) for i in new]
    for i, features in zip(new, backbone.encode(pictures, [crops[i].budget for i in new]), strict=True):
        out[i] = features
        if cache is not None and keys[i]:
            cache.put(keys[i], clone_features(features))
    for i in missing:
        if out[i] is None:
            out[i] = out[first[keys[i]]]
    return [features for features in out if features is not None]


def enlarged(backbone: Backbone, box: MapBox, budget: TokenBudget, rule: BoxRule) -> TokenBudget:
    """The budget of a whole crop of which only tokens on the foreground are read, within `budget` (docs/method.md 3.1).

    Each side grows by k = min(sqrt(1 / share of the foreground in its box), `BoxRule.sparse`), or by less where the
    tokens next to the foreground would exceed the budget. Without a foreground, or with a fixed grid, nothing changes.
    """
    if box.foreground is None or rule.sparse is None or backbone.fixed_grid:
        return budget
    x0, y0, x1, y1 = bounds(box.foreground)
    grow = min(1 / float(box.foreground[y0:y1, x0:x1].mean()), rule.sparse**2)
    size_px = (box.box[2] - box.box[0], box.box[3] - box.box[1])
    least, most = int(budget.min_tokens * grow), int(budget.max_tokens * grow)
    while most > budget.max_tokens:
        whole = TokenBudget(min(least, most), most)
        read = int(foreground_tokens(box, backbone.grid(size_px, whole), rule.margin_cells).sum())
        if read <= budget.max_tokens:
            return whole
        most = min(most - 1, most * budget.max_tokens // read)
    return budget


def read_tokens(features: VisualFeatures, box: MapBox, config: ZoomConfig) -> VisualFeatures:
    """The tokens of an encoded region that are inserted: all, the foreground, or resized to its coarse cells."""
    if box.foreground is not None:
        chosen = foreground_tokens(box, features.grid, config.box.margin_cells)
        if chosen.all():
            return features
        kept = torch.from_numpy(chosen.ravel().nonzero()[0]).to(features.tokens.device)
        some = _with_tokens(features, features.grid, lambda values: values[kept])
        return dataclasses.replace(some, kept=kept)
    if box.keep is not None:
        shape = torch.as_tensor(box.keep, dtype=torch.float32)[None, None]
        keep = interpolate(shape, size=features.grid, mode="bilinear", align_corners=False).flatten() > 0.5
        if not bool(keep.any()):  # cells far apart that fall between tokens
            return features
        keep = keep.to(features.tokens.device)
        return _with_tokens(features, (1, int(keep.sum())), lambda values: values[keep])
    if config.tokens_per_cell is None:
        return features
    sides = [(box.cells[i + 2] - box.cells[i]) * config.tokens_per_cell for i in (1, 0)]
    scale = min(1.0, *(count / side for count, side in zip(features.grid, sides, strict=True)))
    rows, columns = (max(1, round(side * scale)) for side in sides)

    def resized(values: Tensor) -> Tensor:
        plane = values.T.view(1, -1, *features.grid)
        return interpolate(plane, size=(rows, columns), mode="bilinear", align_corners=False)[0].flatten(1).T

    return _with_tokens(features, (rows, columns), resized)


def _with_tokens(features: VisualFeatures, grid: tuple[int, int], change: Callable[[Tensor], Tensor]) -> VisualFeatures:
    deepstack = tuple(change(level) for level in features.deepstack)
    return dataclasses.replace(features, tokens=change(features.tokens), deepstack=deepstack, grid=grid)


def features_bytes(features: VisualFeatures) -> int:
    """Memory of an encoded picture's features."""
    return sum(t.numel() * t.element_size() for t in (features.tokens, *features.deepstack))


def clone_features(features: VisualFeatures) -> VisualFeatures:
    """A copy that does not keep the rest of its batch in memory."""
    return dataclasses.replace(
        features, tokens=features.tokens.clone(), deepstack=tuple(level.clone() for level in features.deepstack)
    )


@dataclass(frozen=True, slots=True)
class RegionBlock:
    """An encoded region, ready to be inserted."""

    picture: int  # index of its picture in the prompt
    cells: tuple[float, float, float, float]  # x0, y0, x1, y1 in coarse cells of that picture, half-open
    features: VisualFeatures  # the encoded crop


def check_positions(backbone: Backbone, config: ZoomConfig) -> None:
    """Refuse aligned positions where the model has none (ConfigError). Settings that came with a checkpoint are not
    refused: its regions get stock positions."""
    if config.positions == "aligned" and backbone.position_axes == 1:
        raise ConfigError(
            f"Models of type {backbone.family!r} count positions along one axis, so regions have no aligned ones; "
            "leave out positions=aligned, or set second_image."
        )


def insert_regions(
    backbone: Backbone, prompt: Prompt, blocks: Sequence[RegionBlock], config: ZoomConfig
) -> tuple[Prompt, int]:
    """A prompt that also shows the regions.

    Args:
        blocks: one or more; several of one picture follow each other in the given order.

    Returns:
        The new prompt, and how many of its first tokens are unchanged.
    """
    opening, closing = backbone.image_delimiters
    aligned = config.positions == "aligned" and prompt.positions.shape[0] == 3
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    spans: list[VisualSpan] = []
    dropped: list[Tensor] = []  # indices in the prompt that has all tokens of every region
    start, length, whole, shift, reused = 0, 0, 0, 0, len(prompt)
    for span in prompt.spans:
        end = span.stop + len(closing)
        ids.append(prompt.ids[start:end])
        positions.append(prompt.positions[:, start:end] + shift)
        spans.append(dataclasses.replace(span, start=span.start - start + length))
        length, whole, start, moved = length + end - start, whole + end - start, end, shift
        for block in (b for b in blocks if b.picture == span.picture):
            reused = min(reused, length)
            features = block.features
            middle = ids[0].new_full((features.grid[0] * features.grid[1],), backbone.image_token_id)
            ids.append(torch.cat([ids[0].new_tensor(opening), middle, ids[0].new_tensor(closing)]))
            spans.append(VisualSpan(length + len(opening), features, span.picture, "region"))
            if features.kept is not None:
                left_out = torch.ones_like(middle).index_fill(0, features.kept, 0)
                dropped.append(left_out.nonzero()[:, 0] + whole + len(opening))
            length, whole = length + len(opening) + len(features.tokens) + len(closing), whole + len(ids[-1])
            if aligned:
                previous = positions[-1][:, -1:]
                first = prompt.positions[:, span.start].float() + moved
                placed = _aligned(first, span.features.grid, block, previous, config)
                positions.append(placed.to(previous.device))
                shift += max(features.grid) + len(opening) + len(closing)
    ids.append(prompt.ids[start:])
    positions.append(prompt.positions[:, start:] + shift)
    all_ids = torch.cat(ids)
    if aligned:
        all_positions = torch.cat([p.float() for p in positions], dim=1)
    else:
        all_positions = backbone.positions(all_ids, [s.features.grid for s in spans])
    return _without(Prompt(all_ids, all_positions, tuple(spans)), dropped), reused


def _without(prompt: Prompt, dropped: Sequence[Tensor]) -> Prompt:
    """A prompt without the tokens of some indices; the others keep their positions, unless these only count."""
    if not dropped:
        return prompt
    stay = torch.ones_like(prompt.ids, dtype=torch.bool).index_fill(0, torch.cat(list(dropped)), value=False)
    axes, count = prompt.positions.shape[0], int(stay.sum())
    return Prompt(
        prompt.ids[stay], prompt.positions[:, :count] if axes == 1 else prompt.positions[:, stay], prompt.spans
    )


def _aligned(
    first: Tensor, coarse_grid: tuple[int, int], block: RegionBlock, previous: Tensor, config: ZoomConfig
) -> Tensor:
    """Positions (3, block) of one region: rows and columns between those of the coarse cells that its box covers.

    `first` is the position (3,) of the picture's first visual token, where regions of earlier pictures pushed it;
    `previous` is the position (3, 1) of the token before the block.
    """
    rows, columns = block.features.grid
    x0, y0, x1, y1 = block.cells
    height, width = _between(float(first[1]), y0, y1, rows), _between(float(first[2]), x0, x1, columns)
    time = float(first[0]) + (max(coarse_grid) + 2 if config.temporal_shift == "max" else min(coarse_grid))
    tokens = torch.stack(
        [torch.full((rows, columns), time), height[:, None].expand(rows, columns), width[None].expand(rows, columns)]
    ).flatten(1)
    before = previous.float().cpu()
    return torch.cat([before + 1, tokens, before + max(rows, columns) + 2], dim=1)


def _between(first: float, start: float, end: float, count: int) -> Tensor:
    """Positions (count,) from the first to the last of the coarse cells from `start` to `end`, half-open; all in the
    middle where it is less than one cell. `first`: position of cell 0."""
    low, high = (start, end - 1) if end - start >= 1 else ((start + end - 1) / 2,) * 2
    return torch.linspace(first + low, first + high, count)
