"""One question as the engine takes it: a conversation, its pictures, and its options.

Whether a question fits into what the model reads is decided here by arithmetic alone, before any picture is resized or
encoded. The coarse pass is checked before it runs. A region is made to fit: the maximum of its token budget is lowered
to the room that the prompt and the longest answer leave, and only where not even the minimum fits is the question
refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qzoom.backbones.base import Backbone
from qzoom.config import TokenBudget, ZoomConfig
from qzoom.engine.chat import ChatEncoder, Conversation, read_conversation, with_pages
from qzoom.engine.grammar import JsonGrammar
from qzoom.engine.state import Engine, State
from qzoom.errors import BudgetError, ConfigError, HeadsMissingError, LengthError
from qzoom.heads.boxes import MapBox
from qzoom.images.geometry import box_area_px
from qzoom.images.load import ImageLimits, LoadedImage, load_groups
from qzoom.settings import Share, closest, settings
from qzoom.types import SamplingParams, ZoomMode

Limit = TokenBudget | int | tuple[int, int] | None
"""Visual tokens as users write them: a budget, a maximum, a (minimum, maximum) pair, or None for the checkpoint's."""
_Limit = TokenBudget | int | None
LEAST_PAGE_TOKENS = 64
"""Visual tokens that every page of a PDF may have, however many pages share the coarse budget."""


@settings(prefix=False)
class Options:
    """Options of one question; None takes the checkpoint's own value."""

    zoom: ZoomMode = "auto"
    """"auto" asks the gate, "never" answers from the coarse pass, "always" reads the region."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How to decode."""
    gate_threshold: Share | None = None
    """Zoom when the gate's score is at least this."""
    region_threshold: Share | None = None
    """See `ZoomConfig.region_threshold`."""
    coarse_tokens: TokenBudget | None = None
    """Visual tokens of the coarse pass, per picture."""
    region_tokens: TokenBudget | None = None
    """Visual tokens of all regions together."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question, ready to run."""

    conversation: Conversation  # the messages
    ids: tuple[int, ...]  # their token ids, one placeholder per picture
    pictures: tuple[LoadedImage, ...]  # the decoded pictures, in order
    options: Options  # zooming, token limits, decoding
    prefix: State | None = None  # what a session has computed of the pictures; None for a fresh question


def make_request(
    chat: ChatEncoder,
    image: Any,
    question: str | Sequence[dict[str, Any]],
    options: Options,
    *,
    system: str | None = None,
    limits: ImageLimits | None = None,
    pages: str = "",
    load: Callable[..., list[tuple[LoadedImage, ...]]] = load_groups,
) -> Request:
    """Read the messages, load the pictures and tokenise.

    Args:
        image, question, system: see `read_conversation`.
        pages: pages of PDFs, such as "1-5,9"; "" for all.
        load: reads all sources, as `load_groups` does.

    Raises:
        QuestionError: the messages cannot be used.
        ImageError: a picture cannot be used.
        ConfigError: pages that a PDF does not have.
    """
    conversation = read_conversation(image, question, system)
    groups = load(conversation.sources, limits, pages)
    conversation = with_pages(conversation, [len(group) for group in groups])
    pictures = tuple(picture for group in groups for picture in group)
    return Request(conversation, tuple(chat.encode(conversation)), pictures, options)


def make_options(
    engine: Engine,
    *,
    zoom: ZoomMode = "auto",
    gate_threshold: float | None = None,
    region_threshold: float | None = None,
    coarse_tokens: Limit = None,
    region_tokens: Limit = None,
    stop: str | Sequence[str] = (),
    **sampling: Any,
) -> Options:
    """Options from keyword arguments as users write them; see `QZoom.ask`.

    Raises:
        ConfigError: an unknown option (with the closest known one) or a bad value.
    """
    known = [entry.name for entry in dataclasses.fields(SamplingParams)]
    for name in sampling:
        if name not in known:
            every = [*known, *(entry.name for entry in dataclasses.fields(Options) if entry.name != "sampling")]
            raise ConfigError(f"Unknown option {name!r}; {closest(name, every).replace('known keys', 'known options')}")
    if not isinstance(stop, str | list | tuple):
        raise ConfigError(f"stop must be a text or a list of texts, not {stop!r}.")
    coarse = engine.config.coarse_tokens or engine.backbone.default_budget()
    sampling = {name: int(value) if _is_whole(value) else value for name, value in sampling.items()}
    if isinstance(sampling.get("json_schema"), dict):
        sampling["json_schema"] = json.dumps(sampling["json_schema"])
    params = SamplingParams(stop=(stop,) if isinstance(stop, str) else tuple(stop), **sampling)
    if params.json_schema:
        JsonGrammar(engine.backbone, params.json_schema)  # refused here rather than in the running batch
    return Options(
        zoom=zoom,
        sampling=params,
        gate_threshold=gate_threshold,
        region_threshold=region_threshold,
        coarse_tokens=budget(coarse_tokens, coarse),
        region_tokens=budget(region_tokens, engine.config.region_tokens or coarse),
    )


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number, of Python or numpy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def budget(value: Limit, standard: TokenBudget) -> TokenBudget | None:
    """A budget as callers write it: None, a maximum, a (minimum, maximum) pair, or a `TokenBudget`.

    Args:
        value: what the caller gave; a maximum alone keeps the standard's minimum where it can. Only a tuple is a pair,
            since `QZoom.ask_batch` takes a list apart.
        standard: the checkpoint's own limits.

    Raises:
        BudgetError: the limits contradict each other.
    """
    if value is None or isinstance(value, TokenBudget):
        return value
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_whole, value)):
        return TokenBudget(int(value[0]), int(value[1]))
    if not isinstance(value, tuple) and _is_whole(value):
        most = int(value)
        if most < 1:
            raise BudgetError(f"Visual tokens must be at least 1, not {most}.")
        return TokenBudget(max(1, min(standard.min_tokens, most)), most)
    raise BudgetError(
        "A visual-token budget is a maximum, such as 144, or a (minimum, maximum) pair as a tuple, such as (64, 144), "
        f"not {value!r}."
    )


def share_tokens(
    zoom: ZoomMode,
    config: ZoomConfig,
    default: TokenBudget,
    *,
    coarse: TokenBudget | int | None = None,
    region: TokenBudget | int | None = None,
    total: int | None = None,
) -> tuple[TokenBudget | None, TokenBudget | None]:
    """Limits of the coarse view and of all regions together: from one total, or from a limit for each.

    A total goes to the coarse pass alone when nothing may zoom, else half to each; a stated limit wins and the other
    view gets the rest. A maximum on its own keeps the checkpoint's minimum.

    Args:
        default: the limits of the model's own image processor.
        total: most visual tokens of both together.

    Returns:
        Coarse and region limits; None where the model's own apply.

    Raises:
        BudgetError: limits that contradict each other.
    """
    if zoom == "never":
        region = None
    if total is not None:
        if total < 1:
            raise BudgetError(f"max_visual_tokens must be at least 1, not {total}.")
        coarse, region = _split_total(zoom, coarse, region, total)
    own_coarse = config.coarse_tokens or default
    own_region = config.region_tokens or own_coarse
    first = budget(coarse, own_coarse)
    if zoom == "never":
        return first, None
    if region is None and config.region_tokens is None:
        return first, first
    return first, budget(region, own_region)


def _split_total(zoom: ZoomMode, coarse: _Limit, region: _Limit, total: int) -> tuple[_Limit, _Limit]:
    """Fill in what is not stated; both together stay within the total."""
    if zoom == "never":
        _check_total(_maximum(coarse), total)
        return (total if coarse is None else coarse), None
    if coarse is None and region is None:
        if total < 2:
            raise BudgetError("max_visual_tokens must be at least 2 to share between a coarse view and a region.")
        return total - total // 2, total // 2
    if coarse is None:
        _check_total(_maximum(region) + 1, total)
        return total - _maximum(region), region
    if region is None:
        _check_total(_maximum(coarse) + 1, total)
        return coarse, total - _maximum(coarse)
    _check_total(_maximum(coarse) + _maximum(region), total)
    return coarse, region


def _check_total(wanted: int, total: int) -> None:
    if wanted > total:
        raise BudgetError(
            f"Visual-token limits contradict: coarse view and regions may take {wanted} tokens, but max_visual_tokens "
            f"is {total}; raise the total or lower coarse_tokens and region_tokens."
        )


def _maximum(limit: _Limit) -> int:
    if limit is None:
        return 0
    return limit if isinstance(limit, int) else limit.max_tokens


def split_budget(total: TokenBudget, areas_px: Sequence[int]) -> list[TokenBudget]:
    """Share one budget among regions by their area; the parts keep the whole's limits together (BudgetError: fewer
    tokens than regions)."""
    if len(areas_px) == 1:
        return [total]
    if total.max_tokens < len(areas_px):
        raise BudgetError(
            f"region_tokens allows {total.max_tokens} tokens for {len(areas_px)} regions; allow at least one each."
        )
    most = _shares(total.max_tokens, areas_px)
    least = [min(m, s) for m, s in zip(most, _shares(max(total.min_tokens, len(areas_px)), areas_px), strict=True)]
    missing = total.min_tokens - sum(least)
    for i, (low, high) in enumerate(zip(least, most, strict=True)):
        extra = max(0, min(missing, high - low))
        least[i], missing = low + extra, missing - extra
    return [TokenBudget(low, high) for low, high in zip(least, most, strict=True)]


def _shares(total: int, areas_px: Sequence[int]) -> list[int]:
    """Whole numbers of at least 1 that add up to `total`, as near to the areas' shares as that allows."""
    spare, area = total - len(areas_px), max(1, sum(areas_px))
    ends = [spare * sum(areas_px[:i]) // area for i in range(len(areas_px))] + [spare]
    return [1 + end - start for start, end in pairwise(ends)]


def check_heads(engine: Engine, zoom: str) -> None:
    """Zooming needs a region branch; where "auto" may zoom, it does not without one, and says so in the gate's note
    (HeadsMissingError: the checkpoint has none and zoom is "always")."""
    if zoom == "always" and engine.region is None:
        raise HeadsMissingError(
            "This model has no region branch, so it cannot zoom: load a qzoom adapter or a released Q-Zoom checkpoint "
            'made for it, train one with `qzoom train`, or ask with zoom "auto" or "never".'
        )


def coarse_budget(engine: Engine, options: Options) -> TokenBudget:
    """Limits of the coarse view: the question's own, else the checkpoint's, else the image processor's."""
    return options.coarse_tokens or engine.config.coarse_tokens or engine.backbone.default_budget()


def coarse_budgets(engine: Engine, options: Options, pictures: Sequence[LoadedImage]) -> list[TokenBudget]:
    """Limits of the coarse view of every picture; the pages of PDFs share those of one picture."""
    whole = coarse_budget(engine, options)
    share = share_among_pages(whole, sum(picture.page is not None for picture in pictures))
    return [whole if picture.page is None else share for picture in pictures]


def coarse_counts(engine: Engine, request: Request) -> list[int]:
    """Visual tokens of every picture's coarse view."""
    budgets = coarse_budgets(engine, request.options, request.pictures)
    grids = [engine.backbone.grid(p.size_px, own) for p, own in zip(request.pictures, budgets, strict=True)]
    return [rows * columns for rows, columns in grids]


def share_among_pages(whole: TokenBudget, pages: int) -> TokenBudget:
    """What one of several pages gets of a coarse budget: an equal share, but at least `LEAST_PAGE_TOKENS`."""
    if pages < 2:
        return whole
    most = max(whole.max_tokens // pages, min(whole.max_tokens, max(whole.min_tokens, LEAST_PAGE_TOKENS)))
    return TokenBudget(min(whole.min_tokens, most), most)


def region_budget(engine: Engine, options: Options) -> TokenBudget:
    """Limits of all regions together: the question's own, else the checkpoint's, else those of the coarse view."""
    return options.region_tokens or engine.config.region_tokens or coarse_budget(engine, options)


def check_requests(engine: Engine, requests: Sequence[Request]) -> None:
    """Refuse requests whose coarse view cannot fit; nothing is computed but sizes (BudgetError: a token budget asks for
    more than the model reads in all; QuestionError: prompt and answer together are longer than the model reads)."""
    most = engine.backbone.max_positions
    for request in requests:
        coarse, region = coarse_budget(engine, request.options), region_budget(engine, request.options)
        for name, budget in (("coarse_tokens", coarse), ("region_tokens", region)):
            if budget.min_tokens > most:
                raise BudgetError(
                    f"{name} asks for at least {budget.min_tokens} visual tokens, but the model reads at most {most} "
                    "tokens in all; lower its minimum."
                )
        if engine.backbone.fixed_grid and request.options.zoom != "never":
            engine.backbone.grid((1, 1), region)
        if request.prefix is not None:
            visual = [span.stop - span.start for span in request.prefix.prompt.spans]
        else:
            visual = coarse_counts(engine, request)
        check_length(len(request.ids) - len(visual) + sum(visual), request, engine.backbone)


def estimate_bytes(engine: Engine, request: Request) -> int:
    """About how much memory a request takes at its peak, everything included that a coarse pass, one region as large
    as its limits allow and the longest answer need."""
    backbone, options, text = engine.backbone, request.options, engine.backbone.text_config
    visual = sum(coarse_counts(engine, request))
    if options.zoom != "never":
        limits = region_budget(engine, options)
        visual += max((math.prod(backbone.grid(p.size_px, limits)) for p in request.pictures), default=0)
    length = len(request.ids) + visual + options.sampling.max_new_tokens
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or backbone.hidden_size // text.num_attention_heads)
    keys_and_values = 2 * _CACHE_COPIES * width * backbone.num_layers
    states = keys_and_values + _STATES_PER_TOKEN * backbone.hidden_size + length  # with a row of the attention mask
    pixels = _BYTES_PER_PIXEL * backbone.token_px**2
    return length * states * backbone.dtype.itemsize + visual * pixels


_CACHE_COPIES = 3
"""Of keys and values while requests join a batch: their own, those before the region was inserted, the batch's."""
_STATES_PER_TOKEN = 16
"""Hidden states that one layer's pass holds per token, its MLP and the branches included."""
_BYTES_PER_PIXEL = 48
"""Float32 colours of two frames, before and after normalisation."""


def check_length(length: int, request: Request, backbone: Backbone) -> None:
    """Refuse a prompt of `length` tokens whose answer would not fit into what the model reads (LengthError: it does not
    fit)."""
    new = request.options.sampling.max_new_tokens
    if length + new > backbone.max_positions:
        raise LengthError(length, new, backbone.max_positions)


def fit_regions(
    engine: Engine, request: Request, length: int, boxes: Sequence[MapBox]
) -> tuple[tuple[MapBox, ...], list[TokenBudget]]:
    """The regions to read, and how many visual tokens each may take.

    Where the budget or the room left holds fewer tokens than there are regions, the best are kept.

    Args:
        length: tokens of the prompt without regions.
        boxes: one or more, best first.

    Returns:
        The first of the boxes, and a budget for each; together they keep the region budget and the model's length.

    Raises:
        QuestionError: one region of the budget's minimum is more than the model reads.
    """
    if engine.backbone.fixed_grid:
        return _fit_fixed(engine, request, length, boxes)
    total = region_budget(engine, request.options)
    frame = sum(len(ids) for ids in engine.backbone.image_delimiters)
    room = engine.backbone.max_positions - length - request.options.sampling.max_new_tokens
    count = min(len(boxes), total.max_tokens)
    while count > 1 and count * frame + max(count, total.min_tokens) > room:
        count -= 1
    check_length(length + count * frame + total.min_tokens, request, engine.backbone)
    cut = TokenBudget(total.min_tokens, min(total.max_tokens, room - count * frame))
    equal = engine.config.box.shares == "equal"
    return tuple(boxes[:count]), split_budget(cut, [1 if equal else box_area_px(item.box) for item in boxes[:count]])


def _fit_fixed(
    engine: Engine, request: Request, length: int, boxes: Sequence[MapBox]
) -> tuple[tuple[MapBox, ...], list[TokenBudget]]:
    """The first boxes that fit where every region takes the same number of tokens; all of them without a budget."""
    one = engine.backbone.default_budget()
    frame = sum(len(ids) for ids in engine.backbone.image_delimiters)
    room = engine.backbone.max_positions - length - request.options.sampling.max_new_tokens
    own = request.options.region_tokens or engine.config.region_tokens
    most = len(boxes) if own is None else min(len(boxes), max(1, own.max_tokens // one.max_tokens))
    while most > 1 and most * (frame + one.max_tokens) > room:
        most -= 1
    check_length(length + frame + one.max_tokens, request, engine.backbone)
    return tuple(boxes[:most]), [one] * most
