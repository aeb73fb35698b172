"""How an evaluation spends its visual tokens: one total for both looks, or a limit for each (method.md 1).

Only equal totals compare fairly: a plain look may spend all of it, a zooming one shares it between the coarse look and
the regions.
"""

from __future__ import annotations

from qzoom.config import TokenBudget, ZoomConfig
from qzoom.errors import BudgetError
from qzoom.types import ZoomMode

__all__ = ["share_tokens"]

Limit = TokenBudget | int | None


def share_tokens(
    zoom: ZoomMode,
    config: ZoomConfig,
    default: TokenBudget,
    *,
    coarse: Limit = None,
    region: Limit = None,
    total: int | None = None,
) -> tuple[TokenBudget | None, TokenBudget | None]:
    """Limits of the coarse look and of all regions together.

    A total goes to the coarse look alone when nothing may zoom, else half to each; a stated limit wins and the other
    look gets the rest. A maximum on its own keeps the checkpoint's minimum.

    Args:
        zoom: "never" leaves the regions out.
        config: the checkpoint's arithmetic.
        default: the limits of the model's own image processor.
        coarse: limit of the coarse look.
        region: limit of the regions.
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
        coarse, region = _split(zoom, coarse, region, total)
    own_coarse = config.coarse_tokens or default
    own_region = config.region_tokens or own_coarse
    first = _limit(coarse, own_coarse)
    if zoom == "never":
        return first, None
    if region is None and config.region_tokens is None:
        return first, first
    return first, _limit(region, own_region)


def _split(zoom: ZoomMode, coarse: Limit, region: Limit, total: int) -> tuple[Limit, Limit]:
    """Fill in what is not stated; both together stay within the total."""
    if zoom == "never":
        _check(_most(coarse), total)
        return (total if coarse is None else coarse), None
    if coarse is None and region is None:
        if total < 2:
            raise BudgetError("max_visual_tokens must be at least 2 to share between a coarse look and a region.")
        return total - total // 2, total // 2
    if coarse is None:
        _check(_most(region) + 1, total)
        return total - _most(region), region
    if region is None:
        _check(_most(coarse) + 1, total)
        return coarse, total - _most(coarse)
    _check(_most(coarse) + _most(region), total)
    return coarse, region


def _check(wanted: int, total: int) -> None:
    if wanted > total:
        raise BudgetError(
            f"Visual-token limits contradict: the looks may take {wanted} tokens, but max_visual_tokens is {total}; "
            "raise the total or lower coarse_tokens and region_tokens."
        )


def _most(limit: Limit) -> int:
    if limit is None:
        return 0
    return limit if isinstance(limit, int) else limit.max_tokens


def _limit(limit: Limit, own: TokenBudget) -> TokenBudget | None:
    if limit is None or isinstance(limit, TokenBudget):
        return limit
    return TokenBudget(max(1, min(own.min_tokens, limit)), limit)
