"""The routes, each declared above its function: chat completions, perceive, the models, and the server's own state.

A stream's first chunk has `delta.qzoom` (gate and regions), so that a page can draw before the text comes; the chunk
with `finish_reason` has the same record once more, final and with all times, as `qzoom` beside `choices`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qzoom import __version__
from qzoom.errors import LengthError
from qzoom.serving import replies
from qzoom.serving.convert import variants
from qzoom.serving.errors import ApiError, from_exception, log_failure
from qzoom.serving.metrics import CONTENT_TYPE
from qzoom.serving.middleware import REQUEST_ID, TENANT, release_body_slot
from qzoom.serving.protocol import ChatRequest, PerceiveRequest
from qzoom.serving.replies import LogprobRecord, logprob_record
from qzoom.serving.service import ResponseStream, Service
from qzoom.types import Answer, StreamEvent, TokenLogprob

Body = TypeVar("Body", bound=PerceiveRequest)
Result = TypeVar("Result")

router = APIRouter()
_REFUSALS = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)


def _documented(reply: Any, *refusals: int, unready: Any = None, **ok: Any) -> dict[str, Any]:
    """What the OpenAPI document says of a route: its reply, and the statuses of its refusals."""
    responses: dict[int, dict[str, Any]] = {status: {"model": replies.ErrorReply} for status in (*refusals, 401)}
    responses[200] = ({"model": reply} if reply else {}) | ok
    if unready:
        responses[503] = {"model": unready}
    return {"response_model": None, "responses": responses}


@router.post(
    "/v1/chat/completions", **_documented(replies.ChatCompletion, *_REFUSALS, content={"text/event-stream": {}})
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation about pictures.

    Answers equal `QZoom.ask`'s in float32: greedy unless a temperature is given, at most 128 tokens unless `max_tokens`
    says otherwise. `qzoom` in the request sets the zooming; `qzoom` in the answer's message has gate and regions.
    """
    body, streams, firsts = await _begin(request, ChatRequest)
    if body.stream:
        return _EventStream(streams, _chunks(request, body, streams, firsts))

    async def ended() -> list[Answer]:
        return [await stream.answer(first) for stream, first in zip(streams, firsts, strict=True)]

    try:
        answers = await _unless_disconnected(request, ended())
    finally:
        _cancel(streams)
    heatmap = bool(body.qzoom and body.qzoom.heatmap)
    return JSONResponse(replies.completion(body.model, answers, _tokenizer(request), heatmap=heatmap))


@router.post("/v1/perceive", **_documented(replies.PerceptionReply, *_REFUSALS))
async def perceive(request: Request) -> Response:
    """Return gate, regions and region map for a question, without an answer.

    Regions are returned whatever the gate decides, the map unless `qzoom.heatmap` is false.
    """
    body, streams, (first,) = await _begin(request, PerceiveRequest)
    _cancel(streams)
    if first.perception is None:
        raise RuntimeError("the worker's first event was not a perception")
    _service(request).metrics.perceived(first.perception)
    heatmap = body.qzoom is None or body.qzoom.heatmap is not False
    return JSONResponse(replies.perception_reply(body.model, first.perception, heatmap=heatmap))


@router.post("/v1/pages", **_documented(replies.PagesReply, *_REFUSALS))
async def pages(request: Request) -> Response:
    """Return the pages of a PDF as pictures, drawn as they are read for a question about it."""
    service = _service(request)
    reading = service.reading(time.monotonic())
    raw = await _json_body(request)

    async def draw() -> replies.PagesReply:
        try:
            return await service.pages(raw, request.scope[TENANT], reading)
        finally:
            release_body_slot(request.scope, reading.work)

    return JSONResponse(await _unless_disconnected(request, draw()))


@router.get("/v1/models", **_documented(replies.ModelList))
async def models(request: Request) -> Response:
    """The one model served, with what it can do and what a request may ask for."""
    return JSONResponse({"object": "list", "data": [_card(_service(request))]})


@router.get("/v1/models/{name:path}", **_documented(replies.ModelCard, 404))
async def model(request: Request) -> Response:
    """One model by name."""
    service = _service(request)
    if request.path_params["name"] != service.settings.model_name:
        raise service.no_model(request.path_params["name"])
    return JSONResponse(_card(service))


@router.get("/health", **_documented(dict[Literal["status"], str]))
async def health(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", **_documented(dict[Literal["status"], str], unready=dict[Literal["status"], str]))
async def ready(request: Request) -> Response:
    """The worker made a step a moment ago, and the server is not stopping; else status 503."""
    reason = await _service(request).ready()
    return JSONResponse({"status": reason or "ready"}, status_code=503 if reason else 200)


@router.get("/version", **_documented(dict[Literal["version"], str]))
async def version(request: Request) -> Response:
    """The version of qzoom."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", response_class=Response, **_documented(None, content={"text/plain": {}}))
async def metrics(request: Request) -> Response:
    """Counters in Prometheus's text format."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _tokenizer(request: Request) -> Any:
    return _service(request).engine.model.engine.backbone.tokenizer


def _cancel(streams: Sequence[ResponseStream]) -> None:
    for stream in streams:
        stream.cancel()


async def _begin(request: Request, kind: type[Body]) -> tuple[Body, list[ResponseStream], list[StreamEvent]]:
    """Read the body and wait for each answer's first event, so that whatever is wrong before it has a status
    (QZoomError: the request cannot be answered; ClientDisconnect: the client closed the connection)."""
    service, arrived_s = _service(request), time.monotonic()
    reading = service.reading(arrived_s)
    raw = await _json_body(request)
    tenant = request.scope[TENANT]

    async def begin() -> tuple[Body, list[ResponseStream], list[StreamEvent]]:
        try:
            body, engine_request = await service.read(kind, raw, tenant, reading)
        finally:
            release_body_slot(request.scope, reading.work)
        streams: list[ResponseStream] = []
        how = {"perceive": kind is PerceiveRequest, "streamed": bool(getattr(body, "stream", False))}
        try:
            for variant in variants(engine_request, getattr(body, "n", None) or 1):
                streams.append(service.submit(variant, tenant, arrived_s, **how))
            return body, streams, [await stream.next() for stream in streams]
        except BaseException as error:
            _cancel(streams)
            if isinstance(error, LengthError):
                raise _too_long(body, error) from error
            raise

    return await _unless_disconnected(request, begin())


def _too_long(body: PerceiveRequest, error: LengthError) -> ApiError:
    """The refusal of a prompt that does not fit, with the fields that the client sent."""
    limits = [name for name in ("max_completion_tokens", "max_tokens") if getattr(body, name, None) is not None][:1]
    limits += ["qzoom.max_visual_tokens"] * bool(body.qzoom and body.qzoom.max_visual_tokens)
    advice = f"shorten the messages or lower {' or '.join(limits)}" if limits else "shorten the messages"
    facts = error.facts(*error.numbers)
    if not isinstance(body, ChatRequest):
        facts = facts.replace(f" and the answer up to {error.numbers[1]}", "")
    return ApiError(400, f"{facts}; {advice}.", param="messages", code="invalid_question")


async def _json_body(request: Request) -> bytes:
    """The whole body.

    Only `application/json` is taken: a page of another origin cannot send that without the browser asking us first
    (ApiError: status 415).
    """
    packed = ", ".join(request.headers.getlist("content-encoding")).strip()
    if packed.lower() not in ("", "identity"):
        text = f"Content-Encoding {ascii(packed)[1:-1][:40]} is not read; send the body as it is, without that header."
        raise ApiError(415, text, param="Content-Encoding")
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON; send the header 'Content-Type: application/json'.")
    return await request.body()


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client closes the connection first (ClientDisconnect: the
    client closed the connection). `request`: its body must have been read."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events of one request; whatever ends the sending frees the slots."""

    def __init__(self, streams: Sequence[ResponseStream], chunks: AsyncIterator[bytes]) -> None:
        self._streams = streams
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._streams)


async def _merged(
    streams: Sequence[ResponseStream], firsts: Sequence[StreamEvent]
) -> AsyncIterator[tuple[int, StreamEvent]]:
    """The events of several answers as they come, each with the answer's index."""
    waiting: dict[asyncio.Task[StreamEvent], int] = {}
    came = list(enumerate(firsts))
    try:
        while came or waiting:
            for index, event in came:
                yield index, event
                if event.answer is None:
                    waiting[asyncio.ensure_future(streams[index].next())] = index
            if not waiting:
                return
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            came = sorted(((waiting.pop(task), task.result()) for task in done), key=lambda pair: pair[0])
    finally:
        for task in waiting:
            task.cancel()


async def _chunks(
    request: Request, body: ChatRequest, streams: Sequence[ResponseStream], firsts: Sequence[StreamEvent]
) -> AsyncIterator[bytes]:
    """The events of a stream from its first ones on, as OpenAI's chunks."""
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    common: dict[str, Any] = {
        **replies.header("chatcmpl", body.model),
        "object": "chat.completion.chunk",
        "system_fingerprint": replies.FINGERPRINT,
    }
    if with_usage:
        common["usage"] = None
    tokenizer, reported, usages = _tokenizer(request), [0] * len(streams), []
    try:
        async for index, event in _merged(streams, firsts):
            if event.answer is not None:
                answer, left = event.answer, event.answer.logprobs[reported[index] :]
                usages.append(answer.usage)
                record = {"qzoom": replies.zoom_record(answer, heatmap=False)}
                yield _chunk(common | record, index, {}, _logprobs(tokenizer, left), answer.finish_reason)
            elif event.perception is not None:
                heatmap = bool(body.qzoom and body.qzoom.heatmap)
                record = {"qzoom": replies.zoom_record(event.perception, heatmap=heatmap)}
                yield _chunk(common, index, {"role": "assistant", "content": ""} | record)
            else:
                reported[index] += len(event.logprobs)
                yield _chunk(common, index, {"content": event.text}, _logprobs(tokenizer, event.logprobs))
    except Exception as error:
        # The status has been sent; the error becomes the stream's last record.
        log_failure(error, request.scope[REQUEST_ID])
        yield _data(from_exception(error).body())
        yield b"data: [DONE]\n\n"
        return
    if with_usage:
        yield _data(common | {"choices": [], "usage": replies.usage_record(usages)})
    yield b"data: [DONE]\n\n"


def _logprobs(tokenizer: Any, logprobs: Sequence[TokenLogprob]) -> LogprobRecord | None:
    return logprob_record(tokenizer, logprobs) if logprobs else None


def _chunk(
    common: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: LogprobRecord | None = None,
    finish: str | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return _data(common | {"choices": [choice]})


def _data(record: Mapping[str, Any]) -> bytes:
    return (
        b"data: "
        + json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
        + b"\n\n"
    )


def _card(service: Service) -> replies.ModelCard:
    engine, config, limits = service.engine.model.engine, service.engine.model.config, service.settings.limits
    coarse = config.coarse_tokens or engine.backbone.default_budget()
    region = config.region_tokens or coarse
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "qzoom",
        "max_model_len": engine.backbone.max_positions,
        "qzoom": {
            "zooms": service.engine.model.has_region,
            "gate": service.engine.model.has_gate,
            "gate_threshold": config.gate_threshold,
            "region_threshold": config.region_threshold,
            "coarse_tokens": [coarse.min_tokens, coarse.max_tokens],
            "region_tokens": [region.min_tokens, region.max_tokens],
            "cell_px": engine.backbone.token_px,
            "embedded": service.engine.model.name == "tiny",
            "limits": {
                "body_bytes": limits.body_bytes,
                "pictures": limits.pictures,
                "picture_bytes": limits.picture_bytes,
                "picture_pixels": limits.picture_pixels,
                "pdf_pages": limits.pdf_pages,
                "max_tokens": limits.max_new_tokens,
                "max_visual_tokens": limits.visual_tokens,
            },
        },
    }
