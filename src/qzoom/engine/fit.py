"""Whether a question fits into what the model reads, by arithmetic alone: before any picture is resized or encoded.

The coarse look is checked before it is taken. A region is cut to fit: the maximum of its token budget is lowered to the
room that the prompt and the longest answer leave, and only where not even the minimum fits is the question refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from qzoom.backbones.base import Backbone
from qzoom.config import TokenBudget
from qzoom.engine.request import Options, Request, split_budget
from qzoom.engine.state import Engine
from qzoom.errors import BudgetError, QuestionError
from qzoom.heads.boxes import MapBox
from qzoom.images.geometry import box_area_px

__all__ = ["check_length", "check_requests", "coarse_budget", "fit_regions", "region_budget"]


def coarse_budget(engine: Engine, options: Options) -> TokenBudget:
    """Limits of the coarse look: the question's own, else the checkpoint's, else the image processor's."""
    return options.coarse_tokens or engine.config.coarse_tokens or engine.backbone.default_budget()


def region_budget(engine: Engine, options: Options) -> TokenBudget:
    """Limits of all regions together: the question's own, else the checkpoint's, else those of the coarse look."""
    return options.region_tokens or engine.config.region_tokens or coarse_budget(engine, options)


def check_requests(engine: Engine, requests: Sequence[Request]) -> None:
    """Refuse requests whose coarse look cannot fit; nothing is computed but sizes.

    Raises:
        BudgetError: a token budget asks for more than the model reads in all.
        QuestionError: prompt and answer together are longer than the model reads.
    """
    most = engine.backbone.max_positions
    for request in requests:
        coarse, region = coarse_budget(engine, request.options), region_budget(engine, request.options)
        for name, budget in (("coarse_tokens", coarse), ("region_tokens", region)):
            if budget.min_tokens > most:
                raise BudgetError(
                    f"{name} asks for at least {budget.min_tokens} visual tokens, but the model reads at most {most} "
                    "tokens in all; lower its minimum."
                )
        if request.prefix is not None:
            visual = [span.stop - span.start for span in request.prefix.prompt.spans]
        else:
            grids = [engine.backbone.grid(picture.size_px, coarse) for picture in request.pictures]
            visual = [rows * columns for rows, columns in grids]
        check_length(len(request.ids) - len(visual) + sum(visual), request, engine.backbone)


def check_length(length: int, request: Request, backbone: Backbone) -> None:
    """Refuse a prompt of `length` tokens whose answer would not fit into what the model reads.

    Raises:
        QuestionError: it does not fit.
    """
    new = request.options.sampling.max_new_tokens
    if length + new > backbone.max_positions:
        raise QuestionError(
            f"The prompt takes {length} tokens and the answer up to {new}, but the model reads at most "
            f"{backbone.max_positions}; shorten the question, or lower max_new_tokens, coarse_tokens or region_tokens."
        )


def fit_regions(
    engine: Engine, request: Request, length: int, boxes: Sequence[MapBox]
) -> tuple[tuple[MapBox, ...], list[TokenBudget]]:
    """The regions to read, and how many visual tokens each may take.

    Where the budget or the room left holds fewer tokens than there are regions, the best are kept.

    Args:
        engine: backbone and arithmetic.
        request: whose answer comes after the prompt.
        length: tokens of the prompt without regions.
        boxes: one or more, best first.

    Returns:
        The first of the boxes, and a budget for each; together they keep the region budget and the model's length.

    Raises:
        QuestionError: one region of the budget's minimum is more than the model reads.
    """
    total = region_budget(engine, request.options)
    frame = sum(len(ids) for ids in engine.backbone.block_ids)
    room = engine.backbone.max_positions - length - request.options.sampling.max_new_tokens
    count = min(len(boxes), total.max_tokens)
    while count > 1 and count * frame + max(count, total.min_tokens) > room:
        count -= 1
    check_length(length + count * frame + total.min_tokens, request, engine.backbone)
    cut = TokenBudget(total.min_tokens, min(total.max_tokens, room - count * frame))
    return tuple(boxes[:count]), split_budget(cut, [box_area_px(item.box) for item in boxes[:count]])
