"""POST /v1/chat/completions: a whole answer, or a stream of chunks.

A stream's first chunk has `delta.qzoom` (gate and regions), so that a page can draw before the text comes; the chunk
with `finish_reason` has the same record once more, final and with all times, as `qzoom` beside `choices`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qzoom.serving.auth import TENANT
from qzoom.serving.bodies import json_body
from qzoom.serving.errors import from_exception
from qzoom.serving.leaving import unless_gone
from qzoom.serving.log import log_failure
from qzoom.serving.protocol import ChatRequest
from qzoom.serving.replies import FINGERPRINT, Header, completion, usage_record, zoom_record
from qzoom.serving.service import Job, Running, Service
from qzoom.types import Answer, StreamEvent

__all__ = ["chat_completions"]


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
