"""One question as the engine takes it: a conversation, its pictures, and how to look and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qzoom.config import TokenBudget
from qzoom.engine.chat import ChatEncoder, Conversation, read_conversation
from qzoom.engine.state import Engine, State
from qzoom.errors import BudgetError, ConfigError, HeadsMissingError
from qzoom.images.load import ImageLimits, LoadedImage, load_image
from qzoom.types import SamplingParams, ZoomMode

__all__ = ["Options", "Request", "budget", "check_heads", "make_request", "split_budget"]

ZOOM_MODES = ("auto", "never", "always")


@dataclass(frozen=True, slots=True)
class Options:
    """How one question is looked at and answered; None takes the checkpoint's own value.

    Args:
        zoom: "auto" asks the gate, "never" answers from the coarse look, "always" reads the region.
        sampling: how to decode.
        gate_threshold: zoom when the gate's score is at least this.
        region_threshold: see `ZoomConfig.region_threshold`.
        coarse_tokens: visual tokens of the coarse look, per picture.
        region_tokens: visual tokens of all regions together.
    """

    zoom: ZoomMode = "auto"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    gate_threshold: float | None = None
    region_threshold: float | None = None
    coarse_tokens: TokenBudget | None = None
    region_tokens: TokenBudget | None = None

    def __post_init__(self) -> None:
        if self.zoom not in ZOOM_MODES:
            raise ConfigError(f"zoom must be one of {', '.join(ZOOM_MODES)}, not {self.zoom!r}.")
        for name in ("gate_threshold", "region_threshold"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise ConfigError(f"{name} must be a number between 0 and 1, not {value!r}.")


@dataclass(frozen=True, slots=True)
class Request:
    """One question, ready to run.

    Args:
        conversation: the messages.
        ids: their token ids, one placeholder per picture.
        pictures: the decoded pictures, in order.
        options: how to look and answer.
        prefix: what a session has computed of the pictures; None for a fresh question.
    """

    conversation: Conversation
    ids: tuple[int, ...]
    pictures: tuple[LoadedImage, ...]
    options: Options
    prefix: State | None = None


def make_request(
    chat: ChatEncoder,
    image: Any,
    question: str | Sequence[dict[str, Any]],
    options: Options,
    *,
    system: str | None = None,
    limits: ImageLimits | None = None,
) -> Request:
    """Read the messages, load the pictures and tokenise.

    Raises:
        QuestionError: the messages cannot be used.
        ImageError: a picture cannot be used.
    """
    conversation = read_conversation(image, question, system)
    limits = limits or ImageLimits()
    pictures = tuple(load_image(source, limits) for source in conversation.sources)
    return Request(conversation, tuple(chat.encode(conversation)), pictures, options)


def budget(value: TokenBudget | int | tuple[int, int] | None, standard: TokenBudget) -> TokenBudget | None:
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
    if isinstance(value, tuple) and len(value) == 2:
        return TokenBudget(*value)
    if isinstance(value, int) and not isinstance(value, bool):
        return TokenBudget(max(1, min(standard.min_tokens, value)), value)
    raise BudgetError(f"A visual-token budget is a maximum or a (minimum, maximum) pair, not {value!r}.")


def split_budget(total: TokenBudget, areas_px: Sequence[int]) -> list[TokenBudget]:
    """Share one budget among regions by their area; the parts keep the whole's limits together.

    Raises:
        BudgetError: fewer tokens than regions.
    """
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
    """Zooming needs a region branch.

    Raises:
        HeadsMissingError: the checkpoint has none and zooming was asked for.
    """
    if zoom != "never" and engine.region is None:
        raise HeadsMissingError(
            "This model has no region branch, so it cannot zoom: load a qzoom adapter or a released Q-Zoom checkpoint "
            "made for it, train one with `qzoom train`, or ask with zoom='never'."
        )
