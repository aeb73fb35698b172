"""The method on one page, from requests to the first token of their answers (docs/method.md 1).

    encode        pictures -> visual tokens -> prompts
    coarse pass   the shared layers 0..K-1 read the prompts
    gate          is the coarse pass enough?
    propose       where it is not: the region branch's map -> boxes
    zoom          crop and encode the boxes, insert them, run the shared layers over what is new
    prefill       layers K..N-1
    decode        token by token, in the running batch
    read again    where `ZoomConfig.reread` says so: a smaller crop where the answer was read, and a second answer

`QZoom.ask`, batches, sessions and the server all come through `answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from qzoom.engine.generate import Prefilled, prefill
from qzoom.engine.perceive import CoarseResult, Stopwatch, encode, gate, make_perception, propose
from qzoom.engine.prefix_cache import PrefixCache
from qzoom.engine.request import Request
from qzoom.engine.reread import leave_room, may_be_reread
from qzoom.engine.state import Engine, advance_shared
from qzoom.engine.zoom import zoom
from qzoom.types import Perception, StreamEvent

KeyedEvent = tuple[int, StreamEvent]
"""An event and the key of the request that it belongs to."""


def answer(
    engine: Engine,
    requests: Mapping[int, Request],
    decode: Callable[[Sequence[Prefilled]], Iterable[KeyedEvent]],
    *,
    prefixes: Mapping[int, bytes],
    cache: PrefixCache,
) -> Iterator[KeyedEvent]:
    """Run requests up to the first token of their answers.

    Args:
        decode: takes the requests over and draws their first tokens.
        prefixes: `prefix_key` of the requests that may use the cache.

    Yields:
        A "perception" for every request, then what `decode` yields.
    """
    for keys, prefix_keys, wave in cache.waves(requests, prefixes):
        clock = Stopwatch(engine.backbone.device)
        states = encode(engine, wave, clock)
        with torch.inference_mode(), clock.step("shared_layers"):
            states = advance_shared(engine, states)  # the coarse pass
        coarse = gate(engine, wave, states, clock)
        coarse = propose(engine, coarse, clock)
        for key, item in zip(keys, coarse, strict=True):
            yield key, StreamEvent("perception", perception=make_perception(engine, item, clock))
        zoomed, regions = zoom(engine, leave_room(engine, coarse), clock, prefixes=prefix_keys, cache=cache.regions)
        rows = prefill(engine, zoomed, clock, keys)
        for prefix, item, row in zip(prefix_keys, coarse, rows, strict=True):
            cache.store(prefix, engine, item, row.cache)
        ready = [
            Prefilled(row, own.without_states(engine), crops, clock, before if may_be_reread(engine, before) else None)
            for row, own, crops, before in zip(rows, zoomed, regions, coarse, strict=True)
        ]
        del states, coarse, zoomed, rows, item, row  # what was computed belongs to the decode rows from here on
        events = decode(ready)
        del ready
        yield from events


def coarse_pass(
    engine: Engine, requests: Sequence[Request], clock: Stopwatch, *, everyone: bool = False
) -> list[CoarseResult]:
    """The first half alone: encode, coarse pass, gate, propose (HeadsMissingError, BudgetError, QuestionError: see
    `encode`). `everyone`: run gate and region branch for every request, whatever is decided."""
    states = encode(engine, requests, clock)
    with torch.inference_mode(), clock.step("shared_layers"):
        states = advance_shared(engine, states)
    return propose(engine, gate(engine, requests, states, clock, everyone=everyone), clock, everyone=everyone)


def perceive(engine: Engine, requests: Sequence[Request]) -> list[Perception]:
    """Gate and regions of every request, without an answer."""
    clock = Stopwatch(engine.backbone.device)
    return [make_perception(engine, item, clock) for item in coarse_pass(engine, requests, clock, everyone=True)]
