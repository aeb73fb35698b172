"""POST /v1/chat/completions: a whole answer, or a stream of chunks.

A stream's first chunk has `delta.qzoom` (gate and regions), so that a page can draw before the text comes; the chunk
with `finish_reason` has the same record once more, final and with all times, as `qzoom` beside `choices`.

POST /v1/perceive: gate, regions and map of a question, without an answer.

The small addresses: /health, /ready, /metrics, /version, /v1/models.

The body of a request that must be JSON.

Clients that leave: what is done for them is cancelled at once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qzoom import __version__
from qzoom.errors import QZoomError
from qzoom.serving.errors import ApiError, from_exception, log_failure
from qzoom.serving.metrics import CONTENT_TYPE
from qzoom.serving.middleware import TENANT
from qzoom.serving.protocol import ChatRequest, PerceiveRequest
from qzoom.serving.replies import FINGERPRINT, Header, completion, perception_reply, usage_record, zoom_record
from qzoom.serving.service import Job, Running, Service
from qzoom.types import Answer, Perception, StreamEvent

__all__ = [
    "ClientGoneError",
    "chat_completions",
    "health",
    "json_body",
    "metrics",
    "model",
    "models",
    "perceive",
    "ready",
    "unless_gone",
    "version",
]


async def chat_completions(request: Request) -> Response:
    """Answer a conversation about pictures.

    Answers equal `QZoom.ask`'s: greedy unless a temperature is given, at most 128 tokens unless `max_tokens` says
    otherwise. `qzoom` in the request steers the zooming; `qzoom` in the answer's message says where it looked.
    """
    service: Service = request.app.state.service
    arrived_s = time.monotonic()
    body = await json_body(request)
    job, running, first = await unless_gone(request, _begin(service, request, body, arrived_s))
    asked = job.asked
    assert isinstance(asked, ChatRequest)
    if asked.stream:
        return _EventStream(service, job, running, first)
    try:
        answer = await unless_gone(request, _finish(service, job, running, first))
    finally:
        running.cancel()
    header = Header(asked.model, "chatcmpl")
    return JSONResponse(completion(header, answer, heatmap=_wants_map(asked)))


async def _begin(service: Service, request: Request, body: bytes, arrived_s: float) -> tuple[Job, Running, StreamEvent]:
    """Up to the first event, so that whatever is wrong before it still has a status of its own."""
    job = await service.read(ChatRequest, body, request.scope, arrived_s)
    running = await service.submit(job, request.scope[TENANT])
    try:
        return job, running, await running.next()
    except BaseException:
        running.cancel()
        raise


async def _finish(service: Service, job: Job, running: Running, event: StreamEvent) -> Answer:
    spoken = False
    while event.answer is None:
        if event.kind == "text" and not spoken:
            spoken = True
            service.metrics.first_token_s.observe(time.monotonic() - job.arrived_s)
        event = await running.next()
    _count(service, job, event.answer, spoken)
    return event.answer


def _count(service: Service, job: Job, answer: Answer, spoken: bool) -> None:
    took_s = time.monotonic() - job.arrived_s
    if not spoken:
        service.metrics.first_token_s.observe(took_s)
    service.metrics.request_s.observe(took_s)
    service.metrics.answered(answer)


def _wants_map(asked: ChatRequest) -> bool:
    return bool(asked.qzoom and asked.qzoom.heatmap)


class _EventStream(StreamingResponse):
    """Server-sent events of one answer; whatever ends the sending frees the slot."""

    def __init__(self, service: Service, job: Job, running: Running, first: StreamEvent) -> None:
        self._running = running
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_chunks(service, job, running, first), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


async def _chunks(service: Service, job: Job, running: Running, event: StreamEvent) -> AsyncIterator[bytes]:
    asked = job.asked
    assert isinstance(asked, ChatRequest)
    header = Header(asked.model, "chatcmpl")
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    common = header.fields("chat.completion.chunk") | {"system_fingerprint": FINGERPRINT}
    if with_usage:
        common["usage"] = None
    spoken = False
    try:
        while event.answer is None:
            if event.kind == "perception" and event.perception is not None:
                record = zoom_record(event.perception, heatmap=_wants_map(asked))
                yield _chunk(common, {"role": "assistant", "content": "", "qzoom": record})
            elif event.kind == "text":
                if not spoken:
                    spoken = True
                    service.metrics.first_token_s.observe(time.monotonic() - job.arrived_s)
                yield _chunk(common, {"content": event.text})
            event = await running.next()
    except Exception as error:
        # The status is long gone; the refusal becomes the stream's last record.
        log_failure(error)
        yield _data(from_exception(error).body())
        yield b"data: [DONE]\n\n"
        return
    answer = event.answer
    _count(service, job, answer, spoken)
    last = common | {"qzoom": zoom_record(answer, heatmap=False)}
    yield _chunk(last, {}, answer.finish_reason)
    if with_usage:
        yield _data(common | {"choices": [], "usage": usage_record(answer.usage)})
    yield b"data: [DONE]\n\n"


def _chunk(common: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> bytes:
    return _data(common | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})


def _data(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def perceive(request: Request) -> Response:
    """Say where a question would make the model look.

    Regions are given whatever the gate says. The map comes along unless `qzoom.heatmap` is false.
    """
    service: Service = request.app.state.service
    arrived_s = time.monotonic()
    body = await json_body(request)
    asked, seen = await unless_gone(request, _look(service, request, body, arrived_s))
    heatmap = asked.qzoom is None or asked.qzoom.heatmap is not False
    return JSONResponse(perception_reply(Header(asked.model, "perc"), seen, heatmap=heatmap))


async def _look(
    service: Service, request: Request, body: bytes, arrived_s: float
) -> tuple[PerceiveRequest, Perception]:
    job = await service.read(PerceiveRequest, body, request.scope, arrived_s)
    assert isinstance(job.asked, PerceiveRequest)
    return job.asked, await service.perception(job, request.scope[TENANT])


async def health(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """The worker gave a sign of life a moment ago, and the server is not stopping; else status 503."""
    reason = _service(request).ready()
    return JSONResponse({"status": reason or "ready"}, status_code=503 if reason else 200)


async def metrics(request: Request) -> Response:
    """Counters in Prometheus's text format."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def version(request: Request) -> Response:
    """The version of qzoom."""
    return JSONResponse({"version": __version__})


async def models(request: Request) -> Response:
    """The one model served, with what it can do and what a request may ask for."""
    return JSONResponse({"object": "list", "data": [_card(_service(request))]})


async def model(request: Request) -> Response:
    """One model by name."""
    service = _service(request)
    name = request.path_params["name"]
    if name != service.settings.model_name:
        raise service.no_model(name)
    return JSONResponse(_card(service))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _card(service: Service) -> dict[str, Any]:
    engine, config, limits = service.model.engine, service.model.config, service.settings.limits
    coarse = config.coarse_tokens or engine.backbone.default_budget()
    region = config.region_tokens or coarse
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "qzoom",
        "max_model_len": engine.backbone.max_positions,
        "qzoom": {
            "zooms": service.model.has_region,
            "gate": service.model.has_gate,
            "gate_threshold": config.gate_threshold,
            "region_threshold": config.region_threshold,
            "coarse_tokens": [coarse.min_tokens, coarse.max_tokens],
            "region_tokens": [region.min_tokens, region.max_tokens],
            "cell_px": engine.backbone.token_px,
            "embedded": service.model.name == "tiny",
            "limits": {
                "body_bytes": limits.body_bytes,
                "pictures": limits.pictures,
                "picture_bytes": limits.picture_bytes,
                "picture_pixels": limits.picture_pixels,
                "max_tokens": limits.max_new_tokens,
                "max_visual_tokens": limits.visual_tokens,
            },
        },
    }


async def json_body(request: Request) -> bytes:
    """The whole body.

    Only `application/json` is taken: a page of another origin cannot send that without the browser asking us first.

    Raises:
        ApiError: status 415.
    """
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON; send the header 'Content-Type: application/json'.")
    return await request.body()


Result = TypeVar("Result")


class ClientGoneError(QZoomError):
    """Nobody is left to read the answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes the connection first.

    Args:
        request: its body must have been read.
        work: cleans up after itself when cancelled.

    Raises:
        ClientGoneError: the client left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("The client left.")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
