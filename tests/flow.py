"""The engine's steps one by one, for tests that look at what lies between question and answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qzoom.engine.chat import ChatEncoder
from qzoom.engine.flow import coarse_pass
from qzoom.engine.generate import prefill
from qzoom.engine.perceive import CoarseResult, Stopwatch
from qzoom.engine.request import Options, Request, make_request
from qzoom.engine.state import Engine
from qzoom.engine.zoom import zoom
from qzoom.model import QZoom
from qzoom.types import Region


@dataclass(frozen=True)
class Run:
    """One request's coarse view, the look with its regions read, and the logits of the first answer token."""

    before: CoarseResult
    after: CoarseResult
    regions: tuple[Region, ...]
    logits: Tensor


def request(engine: Engine, image: Any, question: Any, **options: Any) -> Request:
    """A request with these `Options`."""
    return make_request(ChatEncoder(engine.backbone), image, question, Options(**options))


def run(engine: Engine, requests: Sequence[Request]) -> list[Run]:
    """Everything up to the first logits, as one batch."""
    clock = Stopwatch(engine.backbone.device)
    before = coarse_pass(engine, requests, clock)
    after, regions = zoom(engine, before, clock)
    rows = prefill(engine, after, clock)
    return [Run(b, a, r, row.logits) for b, a, r, row in zip(before, after, regions, rows, strict=True)]


def read_once(model: QZoom) -> QZoom:
    """The model without `ZoomConfig.reread`, which only the native engine carries out."""
    config = model.config.replace(reread=None)
    return QZoom(dataclasses.replace(model.engine, config=config), model.name, model.image_limits)


@contextmanager
def count_tokens(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Tokens (rows times length) that pass through each module inside the block."""
    counts = dict.fromkeys(modules, 0)
    handles = []
    for name, module in modules.items():

        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[name] += hidden.shape[0] * hidden.shape[1]

        handles.append(module.register_forward_pre_hook(count, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
