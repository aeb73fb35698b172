"""Reading again: a smaller crop, where the model looked while it wrote its first answer (docs/method.md 4.1).

first answer   from coarse view and region; the attention of a few heads shows where each token of it was read
second crop    around those places, enlarged; coarse view and this crop give a second answer
choice         the likelier of both answers

The region branch works on the coarse view, whose cells are larger than small print. The heads that read look at the
region, whose tokens are finer. Both crops share the token limit of the regions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qzoom.config import RereadRule, TokenBudget
from qzoom.engine.attention import token_attention
from qzoom.engine.cache import KVCache
from qzoom.engine.generate import DecodeBatch, DecodeRow, prefill
from qzoom.engine.perceive import CoarseResult, Stopwatch
from qzoom.engine.request import region_budget
from qzoom.engine.sampling import GREEDY_BELOW, token_logprob
from qzoom.engine.state import Engine, LayerCache
from qzoom.engine.zoom import zoom
from qzoom.heads.boxes import CellBox, MapBox
from qzoom.types import Region

_LEAST_ATTENTION = 0.2  # of a token's whole attention that must fall on the region for its place to count


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer of one request that may be read again."""

    item: CoarseResult  # its prompt has the regions in it
    regions: tuple[Region, ...]  # what was read
    row: DecodeRow  # what decoding needs, or, with `finish`, the whole answer


@dataclass(frozen=True, slots=True)
class _Written:
    """What a model wrote."""

    cache: KVCache  # keys and values of the prompt
    logprobs: tuple[float, ...]  # natural, one per token; negative infinity where it failed

    @property
    def least(self) -> float:
        """Probability of the least certain token."""
        return math.exp(min(self.logprobs))

    @property
    def likelihood(self) -> float:
        """Log probability of the whole text."""
        return sum(self.logprobs)


def leave_room(engine: Engine, coarse: Sequence[CoarseResult]) -> list[CoarseResult]:
    """The requests that may be read again with the first crop's part of their region tokens; the others as they are."""
    rule = engine.config.reread
    return [
        item if rule is None or not _may_be_reread(engine, item) else _limited(item, _parts(engine, item, rule)[0])
        for item in coarse
    ]


@torch.inference_mode()
def reread(
    engine: Engine,
    coarse: Sequence[CoarseResult],
    drafts: Sequence[Draft],
    clock: Stopwatch,
    *,
    eos_ids: Sequence[int] | None = None,
) -> list[Draft]:
    """Write short answers, and read those again that are not sure; without `ZoomConfig.reread` nothing happens.

    A first answer that is longer than the rule says goes on as it is, and so does one whose tokens are all certain, or
    that was not read in the region.

    Args:
        coarse: the requests before their regions were inserted.
        drafts: the same requests after prefill, with `leave_room` before the zoom.
        eos_ids: tokens that end an answer; None uses the model's own.

    Returns:
        The drafts in the same order, each with the answer that counts and with both crops where it was read again.

    Raises:
        ConfigError: the rule names a layer or head that the model does not have.
    """
    rule, out = engine.config.reread, list(drafts)
    chosen = [i for i, draft in enumerate(drafts) if draft.regions and _may_be_reread(engine, draft.item)]
    if rule is None or not chosen:
        return out
    with clock.step("first_answer"):
        first = _write(engine, [drafts[i].row for i in chosen], rule, eos_ids)
        written = dict(zip(chosen, first, strict=True))
        ended = [i for i in chosen if drafts[i].row.finish and drafts[i].row.error is None]
        unsure = [i for i in ended if written[i].least < rule.below]
        places = {i: place_of_answer(engine, drafts[i], written[i].cache, rule) for i in unsure}
    again = {i: box for i, box in places.items() if box is not None}
    if not again:
        return out
    items = [_before_regions(engine, coarse[i], drafts[i], written[i].cache) for i in again]
    items = [
        _limited(dataclasses.replace(item, boxes=(box,)), _parts(engine, item, rule)[1])
        for item, box in zip(items, again.values(), strict=True)
    ]
    items, crops = zoom(engine, items, clock)
    rows = prefill(engine, items, clock, [drafts[i].row.key for i in again])
    with clock.step("second_answer"):
        second = _write(engine, rows, rule, eos_ids)
    for i, item, (crop,), row, own in zip(again, items, crops, rows, second, strict=True):
        both = (*drafts[i].regions, dataclasses.replace(crop, reread=True))
        better = row.finish and own.likelihood > written[i].likelihood
        out[i] = Draft(item, both, row) if better else dataclasses.replace(drafts[i], regions=both)
    return out


def _may_be_reread(engine: Engine, item: CoarseResult) -> bool:
    """Whether the answer is greedy, free text, and from a region, and the region tokens suffice for two crops."""
    params, one = item.request.options.sampling, engine.backbone.default_budget().max_tokens
    own = item.request.options.region_tokens or engine.config.region_tokens
    enough = not engine.backbone.fixed_grid or own is None or own.max_tokens >= 2 * one
    return item.gate.zoomed and params.temperature < GREEDY_BELOW and not params.json_schema and enough


def _parts(engine: Engine, item: CoarseResult, rule: RereadRule) -> tuple[TokenBudget, TokenBudget]:
    """The limits of the first and of the second crop, which keep those of all regions together."""
    whole = region_budget(engine, item.request.options)
    if engine.backbone.fixed_grid:
        return whole, whole
    second = max(1, math.floor(whole.max_tokens * rule.share))
    first = max(1, whole.max_tokens - second)
    return (
        TokenBudget(min(whole.min_tokens, first), first),
        TokenBudget(max(1, math.floor(second * rule.enlarged_to)), second),
    )


def _limited(item: CoarseResult, tokens: TokenBudget) -> CoarseResult:
    options = dataclasses.replace(item.request.options, region_tokens=tokens)
    return dataclasses.replace(item, request=dataclasses.replace(item.request, options=options))


def _write(
    engine: Engine, rows: Sequence[DecodeRow], rule: RereadRule, eos_ids: Sequence[int] | None
) -> list[_Written]:
    """Decode rows until they end or are too long; these can join another batch and go on there."""
    caches = [row.cache.fork() for row in rows]
    logprobs: dict[int, list[float]] = {row.key: [] for row in rows}
    batch = DecodeBatch(engine.backbone, eos_ids)
    pieces = batch.start(rows)
    while pieces:
        for row, _ in pieces:
            failed = row.error is not None
            logprobs[row.key].append(-math.inf if failed else token_logprob(row.logits, row.tokens[-1], 0).logprob)
        for row in batch.rows:
            if len(row.tokens) >= rule.longest:
                batch.preempt(row.key)
        pieces = batch.step()
    return [_Written(cache, tuple(logprobs[row.key])) for cache, row in zip(caches, rows, strict=True)]


def place_of_answer(engine: Engine, draft: Draft, cache: KVCache, rule: RereadRule) -> MapBox | None:
    """Where a written answer was read, as a box to zoom into; None where its tokens did not look at a region.

    A token's place is the region token with the most attention while it was written, mean of the rule's heads. Places
    more than a row away from the middle one do not count, so that one line is left.

    Args:
        cache: keys and values of the prompt.
    """
    prompt, row = draft.item.state.prompt, draft.row
    heads = [(rule.layer, head) for head in rule.heads]
    maps = token_attention(engine.backbone, prompt, cache, row.tokens[:-1], heads)
    if row.finish == "stop" and len(row.tokens) > 1:
        maps = [one[:-1] for one in maps]  # the end was not read anywhere
    boxes = sorted(draft.item.boxes, key=lambda box: box.image)  # as the prompt has them
    spans = [i for i, span in enumerate(prompt.spans) if span.role == "region"]
    seen = [one for one in zip(boxes, (maps[i] for i in spans), strict=True) if one[0].keep is None]
    if not seen:
        return None
    box, shares = max(seen, key=lambda one: float(one[1].sum()))
    line = _line_of(shares)
    if line is None:
        return None
    size_px = draft.item.request.pictures[box.image].size_px
    return _part_of(box, line, shares.shape[1:], size_px, margin=(rule.margin_across, rule.margin_down))


def _line_of(maps: Tensor) -> CellBox | None:
    """The cells (x0, y0, x1, y1, half-open) of one line that the tokens' attention (tokens, rows, columns) is on."""
    share = maps.flatten(1).sum(1)
    at = maps.flatten(1).argmax(1)[share > _LEAST_ATTENTION]
    if not len(at):
        return None
    ys, xs = at // maps.shape[2], at % maps.shape[2]
    near = (ys - ys.median()).abs() <= 1
    ys, xs = ys[near], xs[near]
    return float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1


def _part_of(
    whole: MapBox,
    line: CellBox,
    grid: Sequence[int],
    size_px: tuple[int, int],
    *,
    margin: tuple[float, float],
) -> MapBox:
    """A box around some of a region's tokens, in whole pixels of its picture.

    Args:
        line: x0, y0, x1, y1 in tokens of the region, half-open.
        grid: (rows, columns) of the region.
        size_px: (width, height) of the picture.
        margin: tokens added on either side, across and down.
    """
    sides_px: list[int] = []
    cells: list[float] = []
    for axis, (count, added) in enumerate(zip((grid[1], grid[0]), margin, strict=True)):
        start, end = whole.box[axis], whole.box[axis + 2]
        step_px = (end - start) / count
        low = max(0, math.floor(start + (line[axis] - added) * step_px))
        high = min(size_px[axis], math.ceil(start + (line[axis + 2] + added) * step_px))
        sides_px += [low, high]
        per_px = (whole.cells[axis + 2] - whole.cells[axis]) / (end - start)
        cells += [whole.cells[axis] + (edge - start) * per_px for edge in (low, high)]
    x0, x1, y0, y1 = sides_px
    left, right, top, bottom = cells
    return MapBox(whole.image, (left, top, right, bottom), (x0, y0, x1, y1), whole.score)


def _before_regions(engine: Engine, coarse: CoarseResult, draft: Draft, cache: KVCache) -> CoarseResult:
    """The request before its regions; what the upper layers computed of the coarse view is kept."""
    first = min(span.start for span in draft.item.state.prompt.spans if span.role == "region")
    kept = first - len(engine.backbone.image_delimiters[0])
    layers = range(engine.config.shared_layers, engine.backbone.num_layers)
    upper = LayerCache(cache.truncated(kept).clone(layers), kept)
    return dataclasses.replace(coarse, state=dataclasses.replace(coarse.state, upper=upper, logits=None))
