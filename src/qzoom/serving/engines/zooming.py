"""Engines whose decoder runs elsewhere: a look, the zoom by arithmetic here, then an answer from both views.

Prompts, decisions, boxes, crops and usage are the native engine's own functions on a `QZoom` without base weights;
subclasses only say how a prompt is sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import PIL.Image
import torch

from qzoom.config import TokenBudget
from qzoom.engine.cache import LRUCache
from qzoom.engine.generate import TextStream
from qzoom.engine.perceive import (
    CoarseResult,
    Stopwatch,
    decide,
    gate_threshold,
    make_answer,
    make_perception,
    make_region,
    with_maps,
)
from qzoom.engine.prompt import blank_features, build_prompt, unexpanded
from qzoom.engine.request import Request, check_heads, check_length, check_requests, coarse_budgets, fit_regions
from qzoom.engine.state import State
from qzoom.engine.zoom import RegionBlock, insert_regions
from qzoom.errors import ConfigError, ImageError, InternalError, QueueFullError
from qzoom.heads.region_map import region_map
from qzoom.images.load import LoadedImage
from qzoom.integrations.vllm.heads import LookMode, unpack
from qzoom.model import QZoom
from qzoom.serving.engines.base import Job, ServingEngine
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import Answer, Perception, Region, StreamEvent

Result = TypeVar("Result")
_VIEWS_PART = 4  # of the memory for decoded pictures, for those in their coarse size
_ASPECT = 200  # the processors of vLLM refuse longer pictures


@dataclass(frozen=True, slots=True)
class View:
    """A prompt as it is sent."""

    request: Request  # whose it is
    tenant: str  # see `Job`
    ids: tuple[int, ...]  # token ids, one placeholder per picture
    # for each picture of the conversation its coarse view and the crops that follow it, resized
    pictures: tuple[tuple[PIL.Image.Image, ...], ...]
    begun: tuple[int, ...] = ()  # tokens of the answer that the look drew; they follow `ids`

    @property
    def images(self) -> list[PIL.Image.Image]:
        """All pictures in the order of their placeholders."""
        return [image for own in self.pictures for image in own]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer."""

    tokens: Sequence[int] = ()  # new token ids; empty from engines that send text
    text: str = ""  # new text, from engines that send no tokens
    finish: str = ""  # "stop" or "length" with the last piece
    cached_tokens: int = 0  # prompt tokens that the engine had computed before
    prompt_tokens: int = 0  # as the engine counts them, from engines that send no tokens
    completion_tokens: int = 0  # the same


class ZoomingEngine(ServingEngine):
    """Looks, zooms and lets another engine answer. `model`: tokenizer, arithmetic and limits; the base's weights are
    not used. `limits`: `slots` jobs run at a time and `queue` wait. A model that zooms in a way that needs its own
    decoder is refused (ConfigError)."""

    decides: tuple[str, ...] = ("gate", "map")
    """Values of `ZoomConfig.decide_by` that it carries out."""

    def __init__(self, model: QZoom, limits: SchedulerLimits) -> None:
        super().__init__(model)
        config = model.config
        if config.box.sparse is not None or config.decide_by not in self.decides:
            what = "decide_by" if config.box.sparse is None else "box.sparse"
            raise ConfigError(f"{model.name} zooms by {what}, which only the native engine can; use that, or clear it.")
        self._slots = asyncio.Semaphore(limits.slots)
        self._queue = limits.queue
        self._views: LRUCache[PIL.Image.Image] = LRUCache(
            limits.picture_cache_bytes // _VIEWS_PART, lambda view: 3 * view.width * view.height
        )
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="qzoom-resize")

    @abstractmethod
    async def send_look(self, view: View, mode: LookMode) -> tuple[dict[str, Any], Piece | None]:
        """The plug-in's reply to a look, "score" and "maps" (see `integrations.vllm.heads`), and the first token of
        the answer to the view as it is, drawn as `sampling` says; None where the engine did not send it."""

    @abstractmethod
    def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
        """The engine's answer to a prompt; closing the generator ends it there."""

    async def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def look(self, job: Job) -> Perception:
        """See `ServingEngine.look`."""
        check_heads(self.model.engine, "always")
        async with self._slot():
            clock = Stopwatch(self.model.engine.backbone.device)
            item, _, _ = await self._coarse(job, clock, everyone=True)
            return make_perception(self.model.engine, item, clock)

    async def answer(self, job: Job) -> AsyncGenerator[StreamEvent, None]:
        """See `ServingEngine.answer`."""
        engine = self.model.engine
        async with self._slot():
            clock = Stopwatch(engine.backbone.device)
            item, view, first = await self._coarse(job, clock, everyone=False)
            perception = StreamEvent("perception", perception=make_perception(engine, item, clock))
            told = first is not None or item.gate.zoomed
            if told:  # else nothing is sent before the engine has taken the request
                yield perception
            regions: tuple[Region, ...] = ()
            if item.gate.zoomed:
                with clock.step("crop"):
                    item, view, regions = await self._thread(partial(self._zoom, item, view))
            record = _Record(self.model, item, regions, clock)
            if first is not None:
                record.cached = first.cached_tokens
                if not item.gate.zoomed and self._may_go_on(view, first):
                    view = dataclasses.replace(view, begun=tuple(first.tokens))
                    if text := record.take(first):
                        yield StreamEvent("text", text=text)
            if not record.finish:
                async with aclosing(self.send_answer(view)) as pieces:
                    with clock.step("answer"):
                        async for piece in pieces:
                            if not told:
                                yield perception
                                told = True
                            if text := record.take(piece):
                                yield StreamEvent("text", text=text)
                            if record.finish and not piece.finish:
                                break  # the engine would go on; otherwise its last word, the usage, is still to come
            yield StreamEvent("answer", answer=record.answer())

    def _may_go_on(self, view: View, first: Piece) -> bool:
        """Whether an answer may go on from the look's token as if it were the prompt's: not where tokens of the answer
        count against being repeated."""
        params = view.request.options.sampling
        image = self.model.engine.backbone.image_token_id
        return (
            bool(first.tokens)
            and image not in first.tokens
            and not (params.presence_penalty or params.frequency_penalty)
        )

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among the jobs that run."""
        if self._waiting >= self._queue:
            raise QueueFullError(f"{self._waiting} requests wait already; try again in a moment.", 1.0)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()

    async def _thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _coarse(self, job: Job, clock: Stopwatch, *, everyone: bool) -> tuple[CoarseResult, View, Piece | None]:
        """The coarse view, what gate and region branch say of it where they are asked, and the answer's first token
        where it came with that."""
        request, engine = job.request, self.model.engine
        options = request.options
        with clock.step("resize"):
            state, view = await self._thread(partial(self._view, job))
        gated = engine.config.decide_by == "gate"
        mode: LookMode = "both" if everyone and gated else "auto" if gated and options.zoom == "auto" else "always"
        if not everyone and (options.zoom == "never" or not request.pictures or engine.region is None):
            return CoarseResult(request, state, decide(engine, request, None)), view, None
        with clock.step("look"):
            reply, first = await self.send_look(view, mode)
        score = reply["score"]
        item = CoarseResult(request, state, decide(engine, request, None if score is None else float(score)))
        if everyone or item.gate.zoomed:
            grids = [span.features.grid for span in state.prompt.spans]
            maps = tuple(
                region_map(_known(unpack(own["logits"])), unpack(own["sinks"]), grid, engine.config)
                for own, grid in zip(reply["maps"], grids, strict=True)
            )
            item = with_maps(engine, item, maps)
        return item, view, first

    def _view(self, job: Job) -> tuple[State, View]:
        """The coarse view of a request as it is sent, and the same as a prompt of ours."""
        request, engine = job.request, self.model.engine
        backbone = engine.backbone
        check_heads(engine, request.options.zoom)
        check_requests(engine, [request])
        budgets = coarse_budgets(engine, request.options, request.pictures)
        pictures = tuple((self._coarse_view(p, own),) for p, own in zip(request.pictures, budgets, strict=True))
        view = View(request, job.tenant, request.ids, pictures)
        prompt = build_prompt(backbone, request.ids, [self._features(image) for image in view.images])
        return State.empty(engine, prompt), view

    def _coarse_view(self, picture: LoadedImage, budget: TokenBudget) -> PIL.Image.Image:
        """A picture in its coarse size, from memory where it was asked about before."""
        resize = self.model.engine.backbone.resize
        if not picture.digest:
            return resize(picture.image, budget)
        key = picture.digest + repr((picture.image.mode, picture.size_px, budget)).encode()
        view = self._views.get(key)
        if view is None:
            view = resize(picture.image, budget)
            self._views.put(key, view)
        return view

    def _features(self, image: PIL.Image.Image) -> Any:
        side = self.model.engine.backbone.token_px
        rows, columns = image.height // side, image.width // side
        if max(rows, columns) > _ASPECT * min(rows, columns):
            raise ImageError(
                f"A picture or region of {columns} x {rows} visual tokens is longer than the engine takes, {_ASPECT} "
                "times its breadth; cut it into pieces."
            )
        return blank_features((rows, columns), torch.empty(0), image.size)

    def _zoom(self, item: CoarseResult, view: View) -> tuple[CoarseResult, View, tuple[Region, ...]]:
        """Crop the regions and put them behind their pictures; see `engine.zoom`."""
        engine, request = self.model.engine, item.request
        backbone, prompt = engine.backbone, item.state.prompt
        boxes, budgets = fit_regions(engine, request, len(prompt), item.boxes)
        blocks, regions, crops = [], [], [list(own) for own in view.pictures]
        for box, budget in zip(boxes, budgets, strict=True):
            crop = backbone.resize(backbone.crop(request.pictures[box.image].image, box.box), budget)
            features = self._features(crop)
            blocks.append(RegionBlock(box.image, box.cells, features))
            regions.append(make_region(request, box, features))
            crops[box.image].append(crop)
        zoomed, _ = insert_regions(backbone, prompt, blocks, engine.config)
        check_length(len(zoomed), request, backbone)
        sizes = [span.stop - span.start for span in zoomed.spans]
        ids = tuple(unexpanded(zoomed.ids.tolist(), backbone.image_token_id, sizes))
        pictures = tuple(tuple(own) for own in crops)
        item = dataclasses.replace(item, boxes=boxes, state=item.state.on(zoomed))
        return item, View(request, view.tenant, ids, pictures), tuple(regions)

    def look_params(self, view: View, mode: LookMode) -> dict[str, Any]:
        """What the plug-in is asked: `integrations.vllm.heads.LookParams`."""
        side, engine = self.model.engine.backbone.token_px, self.model.engine
        grids = [(image.height // side, image.width // side) for image in view.images]
        return {"grids": grids, "mode": mode, "threshold": gate_threshold(engine, view.request)}

    def sampling(self, view: View, most: int | None = None) -> dict[str, Any]:
        """How vLLM draws tokens, `most` or what is left of the answer; text, stop texts and the end token are this
        side's business."""
        params, begun = view.request.options.sampling, len(view.begun)
        out: dict[str, Any] = {
            "max_tokens": most or params.max_new_tokens - begun,
            "temperature": params.temperature if params.temperature >= 1e-5 else 0.0,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "ignore_eos": True,
            "detokenize": False,
        }
        if not params.ignore_eos:
            out["stop_token_ids"] = list(self.model.engine.backbone.eos_ids)
        if params.seed is not None:
            out["seed"] = (params.seed + begun) & (2**63 - 1)  # the first draws are used
        return out


class _Record:
    """An answer as its pieces come; tokens become text as in the native engine."""

    def __init__(self, model: QZoom, item: CoarseResult, regions: tuple[Region, ...], clock: Stopwatch) -> None:
        self._model, self._item, self._regions, self._clock = model, item, regions, clock
        self._params = item.request.options.sampling
        self._stream = TextStream(model.engine.backbone.tokenizer, self._params.stop)
        self._tokens: list[int] = []
        self.cached: int | None = None  # prompt tokens that were kept before the request; set by its look if it had one
        self._counted: dict[str, int] = {}
        self._text = ""
        self.finish: Any = ""

    def take(self, piece: Piece) -> str:
        """Add a piece; returns the new text and sets `finish` at the end."""
        text, eos = piece.text, self._model.engine.backbone.eos_ids
        if self.cached is None and piece.cached_tokens:
            self.cached = piece.cached_tokens
        if piece.prompt_tokens:
            self._counted = {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.completion_tokens}
        for token in piece.tokens:
            self._tokens.append(token)
            ended = token in eos and not self._params.ignore_eos
            text += "" if ended else self._stream.push(token)
            if ended or self._stream.stopped:
                self.finish = "stop"
            elif len(self._tokens) >= self._params.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        self.finish = self.finish or piece.finish
        if self.finish and not self._stream.stopped:
            text += self._stream.finish()
        self._text += text
        return text

    def answer(self) -> Answer:
        """The record of the whole answer."""
        answer = make_answer(
            self._model.engine,
            self._item,
            self._regions,
            self._clock,
            text=self._text,
            tokens=self._tokens,
            finish=self.finish,
        )
        usage = dataclasses.replace(answer.usage, reused_tokens=self.cached or 0, **self._counted)
        return dataclasses.replace(answer, usage=usage)


def _known(values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None
    return values


def cache_salt(tenant: str) -> str:
    """What keeps the prefixes of one tenant from the others', without naming the tenant."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:32]


def checked_reply(reply: Any) -> dict[str, Any]:
    """The plug-in's reply to a look (InternalError: there is none, or it is an error)."""
    if not isinstance(reply, dict) or "score" not in reply:
        reason = reply.get("error") if isinstance(reply, dict) else None
        raise InternalError(f"The engine's look failed: {reason or 'it sent no gate and no map'}")
    return reply


def lower_max_positions(model: QZoom, most: int) -> None:
    """Let a model without base weights refuse what its engine would: prompts longer than the engine's limit."""
    text = model.engine.backbone.text_config
    text.max_position_embeddings = min(int(text.max_position_embeddings), most)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that an engine with too many requests asks to wait; 1 where it says nothing or a date."""
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isdecimal() else 1.0
