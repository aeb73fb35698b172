"""Reading again: a smaller crop, where the model looked while it wrote its first answer (docs/method.md 4.1).

first answer   from coarse view and region; the attention of a few heads shows where each token of it was read
second crop    around those places, enlarged; coarse view and this crop give a second answer
choice         the likelier of both answers

The region branch works on the coarse view, whose cells are larger than small print. The heads that read look at the
region, whose tokens are finer. Both crops share the token limit of the regions.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qzoom.config import RereadRule, TokenBudget
from qzoom.engine.attention import token_attention
from qzoom.engine.cache import KVCache
from qzoom.engine.generate import DecodeRow, Prefilled, prefill
from qzoom.engine.perceive import CoarseResult
from qzoom.engine.request import region_budget
from qzoom.engine.sampling import GREEDY_BELOW, token_logprob
from qzoom.engine.state import Engine, LayerCache
from qzoom.engine.zoom import zoom
from qzoom.errors import QuestionError, is_short_of_memory
from qzoom.heads.boxes import CellBox, MapBox

_log = logging.getLogger(__name__)
_LEAST_ATTENTION = 0.2  # of a token's whole attention that must fall on the region for its place to count


class Draft:
    """One request's answer, held back in the running batch until it is clear which reading counts.

    The first reading counts when it is longer than the rule says, when all its tokens are certain, or when it was not
    read in a region. Otherwise `start_again` gives the row of a second reading.

    Args:
        first: the request after prefill, with `before`, and before its row joins the batch.
        rule: when and where to read again.
    """

    def __init__(self, first: Prefilled, rule: RereadRule) -> None:
        self.reading = dataclasses.replace(first, before=None)
        """The reading that is being decoded; in the end the one that counts."""
        self.text = ""
        """What `reading` has given so far."""
        self._rule = rule
        self._before = first.before
        self._cache = first.row.cache.fork()  # the prompt's keys and values
        self._logprobs: list[float] = []
        self._earlier: tuple[Prefilled, str, float] | None = None  # the first reading, its text, its log probability

    @property
    def tokens(self) -> int:
        """Tokens of both readings so far."""
        return len(self.reading.row.tokens) + (len(self._earlier[0].row.tokens) if self._earlier else 0)

    def add(self, text: str) -> Literal["open", "unsure", "counts"]:
        """Take a new token's text in.

        Returns:
            "open" while the reading goes on, "unsure" when the first one should be read again, "counts" when `reading`
            is the one to tell; where a second one was too long, its row may still be in the batch.
        """
        row = self.reading.row
        self.text += text
        if row.error is None:
            self._logprobs.append(token_logprob(row.logits, row.tokens[-1], 0).logprob)
            if not row.finish and len(row.tokens) < self._rule.longest:
                return "open"
        if self._earlier is not None:
            failed = row.error is not None or not row.finish
            if failed or sum(self._logprobs) <= self._earlier[2]:
                self._keep_first(self._earlier)
            return "counts"
        sure = row.error is not None or not row.finish or math.exp(min(self._logprobs)) >= self._rule.below
        return "counts" if sure else "unsure"

    def cancel(self, text: str) -> None:
        """End it with the first reading, which may have ended already; `text` had been held back by the row."""
        self.text += text
        if self._earlier is not None:
            self._keep_first(self._earlier)

    def place(self, engine: Engine) -> MapBox | None:
        """`place_of_answer` of the first reading."""
        return place_of_answer(engine, self.reading, self._cache, self._rule)

    def before_regions(self, engine: Engine) -> CoarseResult:
        """The request before its regions; what the upper layers computed of the coarse view is kept."""
        before, prompt = self._before, self.reading.coarse.state.prompt
        assert before is not None
        kept = min(span.start for span in prompt.spans if span.role == "region")
        kept -= len(engine.backbone.image_delimiters[0])
        layers = range(engine.config.shared_layers, engine.backbone.num_layers)
        upper = LayerCache(self._cache.truncated(kept).clone(layers), kept)
        return dataclasses.replace(before, state=dataclasses.replace(before.state, upper=upper, logits=None))

    def begin_second(self, second: Prefilled) -> None:
        """Go on with the second reading."""
        self._earlier = (self.reading, self.text, sum(self._logprobs))
        self.reading, self.text, self._logprobs = second, "", []
        self._before, self._cache = None, KVCache()

    def _keep_first(self, earlier: tuple[Prefilled, str, float]) -> None:
        first, self.text, _ = earlier
        self.reading = dataclasses.replace(first, regions=self.reading.regions)


def leave_room(engine: Engine, coarse: Sequence[CoarseResult]) -> list[CoarseResult]:
    """The requests that may be read again with the first crop's part of their region tokens; the others as they are."""
    rule = engine.config.reread
    if rule is None:
        return list(coarse)
    return [_limited(item, _parts(engine, item, rule)[0]) if may_be_reread(engine, item) else item for item in coarse]


@torch.inference_mode()
def start_again(engine: Engine, drafts: Sequence[Draft]) -> list[DecodeRow]:
    """Crop, encode and prefill the second readings of unsure answers; these must share a clock.

    Returns:
        A row for each second reading, which is the `reading` of its draft from now on. A draft whose answer was not
        read in a region has none, and its first reading counts; so does one whose second crop finds no room, be it in
        what the model reads or in the memory.

    Raises:
        ConfigError: the rule names a layer or head that the model does not have.
    """
    rows = _tried(engine, drafts)
    if rows is None and len(drafts) > 1:
        return [row for draft in drafts for row in _tried(engine, [draft]) or ()]
    return rows or []


def _tried(engine: Engine, drafts: Sequence[Draft]) -> list[DecodeRow] | None:
    """The rows of `_start_again`, or None where it fails; what the attempt held is free again then."""
    try:
        return _start_again(engine, drafts)
    except QuestionError:  # too long
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_short_of_memory(error):
            raise
        _log.exception("Memory was short when %d answers were to be read a second time together.", len(drafts))
        return None


def _start_again(engine: Engine, drafts: Sequence[Draft]) -> list[DecodeRow]:
    rule, clock = engine.config.reread, drafts[0].reading.clock
    assert rule is not None
    with clock.step("place_of_answer"):
        places = [draft.place(engine) for draft in drafts]
    again = [(draft, box) for draft, box in zip(drafts, places, strict=True) if box is not None]
    if not again:
        return []
    items = [dataclasses.replace(draft.before_regions(engine), boxes=(box,)) for draft, box in again]
    items = [_limited(item, _parts(engine, item, rule)[1]) for item in items]
    items, crops = zoom(engine, items, clock)
    rows = prefill(engine, items, clock, [draft.reading.row.key for draft, _ in again])
    for (draft, _), item, (crop,), row in zip(again, items, crops, rows, strict=True):
        regions = (*draft.reading.regions, dataclasses.replace(crop, reread=True))
        draft.begin_second(Prefilled(row, item.without_states(engine), regions, clock))
    return rows


def may_be_reread(engine: Engine, item: CoarseResult) -> bool:
    """Whether there is a rule, the answer is greedy, free text, and from a region, and the region tokens suffice for
    two crops."""
    rule, options = engine.config.reread, item.request.options
    if rule is None:
        return False
    params = options.sampling
    if engine.backbone.fixed_grid:
        own = options.region_tokens or engine.config.region_tokens
        enough = own is not None and own.max_tokens >= 2 * engine.backbone.default_budget().max_tokens
    else:
        enough = region_budget(engine, options).max_tokens >= rule.least_tokens
    return item.gate.zoomed and params.temperature < GREEDY_BELOW and not params.json_schema and enough


def _parts(engine: Engine, item: CoarseResult, rule: RereadRule) -> tuple[TokenBudget, TokenBudget]:
    """The limits of the first and of the second crop, which keep those of all regions together."""
    whole = region_budget(engine, item.request.options)
    if engine.backbone.fixed_grid:
        one = engine.backbone.default_budget()
        return TokenBudget(whole.min_tokens, whole.max_tokens - one.max_tokens), one
    second = max(1, math.floor(whole.max_tokens * rule.share))
    first = max(1, whole.max_tokens - second)
    return (
        TokenBudget(min(whole.min_tokens, first), first),
        TokenBudget(max(1, math.floor(second * rule.enlarged_to)), second),
    )


def _limited(item: CoarseResult, tokens: TokenBudget) -> CoarseResult:
    options = dataclasses.replace(item.request.options, region_tokens=tokens)
    return dataclasses.replace(item, request=dataclasses.replace(item.request, options=options))


def place_of_answer(engine: Engine, first: Prefilled, cache: KVCache, rule: RereadRule) -> MapBox | None:
    """Where a written answer was read, as a box to zoom into; None where its tokens did not look at a region.

    A token's place is the region token with the most attention while it was written, mean of the rule's heads. Places
    more than a row away from the middle one do not count, so that one line is left.

    Args:
        cache: keys and values of the prompt.
    """
    item, row = first.coarse, first.row
    prompt = item.state.prompt
    heads = [(rule.layer, head) for head in rule.heads]
    maps = token_attention(engine.backbone, prompt, cache, row.tokens[:-1], heads)
    if row.finish == "stop" and len(row.tokens) > 1:
        maps = [one[:-1] for one in maps]  # the end was not read anywhere
    boxes = sorted(item.boxes, key=lambda box: box.image)  # as the prompt has them
    spans = [i for i, span in enumerate(prompt.spans) if span.role == "region"]
    seen = [one for one in zip(boxes, (maps[i] for i in spans), strict=True) if one[0].keep is None]
    if not seen:
        return None
    box, shares = max(seen, key=lambda one: float(one[1].sum()))
    line = _line_of(shares)
    if line is None:
        return None
    size_px = item.request.pictures[box.image].size_px
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
