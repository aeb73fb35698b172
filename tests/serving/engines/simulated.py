"""An engine that does with the native model what vLLM with the plug-in does, for tests without vLLM.

It takes token ids with one placeholder per picture and pictures that are resized already, runs the branches through the
plug-in's own `Heads`, and speaks the two routes of `vllm serve` that the front end uses.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from starlette.responses import JSONResponse, Response, StreamingResponse

from qzoom import QZoom
from qzoom.checkpoints.hub import find_source
from qzoom.checkpoints.load import checkpoint_identity, load_engine
from qzoom.config import TokenBudget
from qzoom.engine.generate import DecodeBatch, DecodeRow, Sampler, TextStream
from qzoom.engine.prompt import build_prompt
from qzoom.engine.state import State, advance_shared, advance_upper
from qzoom.images.load import pixel_digest
from qzoom.integrations.vllm.heads import Heads, Look, LookMode, read_params
from qzoom.serving.engines.zooming import Piece, View, ZoomingEngine
from qzoom.serving.server import bind
from qzoom.serving.settings import SchedulerLimits
from qzoom.types import SamplingParams


def front(checkpoint: str = "tiny") -> QZoom:
    """What the front end has of a model: everything but the base's weights."""
    return QZoom(load_engine(checkpoint, dtype="float32", base_weights=False), checkpoint)


class Decoder:
    """Looks and tokens by the native model."""

    def __init__(self, native: QZoom, checkpoint: str = "tiny") -> None:
        self.native = native
        self.heads = Heads(checkpoint, torch.device("cpu"), torch.float32)
        self.lock = threading.Lock()

    @torch.inference_mode()
    def state(self, ids: Sequence[int], images: Sequence[Image.Image]) -> State:
        backbone = self.native.engine.backbone
        counts = [image.width * image.height // backbone.token_px**2 for image in images]
        features = backbone.encode(images, [TokenBudget(count, count) for count in counts])
        prompt = build_prompt(backbone, ids, features)
        return advance_shared(self.native.engine, [State.empty(self.native.engine, prompt)])[0]

    def look(self, ids: Sequence[int], images: Sequence[Image.Image], params: Any) -> dict[str, Any]:
        with self.lock:
            state = self.state(ids, images)
            names = tuple(pixel_digest(image).hex() for image in images)
            return self.heads.run([Look(state.hidden, state.prompt.ids.tolist(), read_params(params), names)])[0]

    @torch.inference_mode()
    def tokens(self, ids: Sequence[int], images: Sequence[Image.Image], sampling: dict[str, Any]) -> list[int]:
        engine = self.native.engine
        params = SamplingParams(max_new_tokens=sampling["max_tokens"], ignore_eos="stop_token_ids" not in sampling)
        with self.lock:
            (state,), (logits,) = advance_upper(engine, [self.state(ids, images)])
            cache = state.shared.cache.merged(state.upper.cache)
            stream = TextStream(engine.backbone.tokenizer)
            position = state.prompt.next_position
            row = DecodeRow(0, cache, len(state.prompt), position, logits, params, Sampler(params), stream)
            batch = DecodeBatch(engine.backbone)
            batch.start([row])
            while batch.rows:
                batch.step()
        return row.tokens


class SimulatedEngine(ZoomingEngine):
    """A `Decoder` without a network between."""

    def __init__(self, decoder: Decoder, model: QZoom, limits: SchedulerLimits | None = None) -> None:
        super().__init__(model, limits or SchedulerLimits())
        self.decoder = decoder
        self.modes: list[str] = []

    async def health(self) -> str:
        return ""

    async def send_look(self, view: View, mode: LookMode) -> tuple[dict[str, Any], Piece | None]:
        self.modes.append(mode)
        reply = await asyncio.to_thread(self.decoder.look, view.ids, view.images, self.look_params(view, mode))
        return reply, Piece(await self._tokens(view, 1))

    async def send_answer(self, view: View) -> AsyncGenerator[Piece, None]:
        for token in await self._tokens(view):
            yield Piece((token,))

    async def _tokens(self, view: View, most: int | None = None) -> list[int]:
        ids = [*view.ids, *view.begun]
        return await asyncio.to_thread(self.decoder.tokens, ids, view.images, self.sampling(view, most))


class FakeServer:
    """The routes of `vllm serve`, and the ways in which they can fail.

    `fault` is one of "", "no-route", "no-plugin", "other-base", "other-heads", "key", "garbage", "broken" (500), "full"
    (429), "cut" (the stream ends in its middle), "error" (an error record in the stream).
    """

    def __init__(self, decoder: Decoder, fault: str = "") -> None:
        self.decoder, self.fault = decoder, fault
        self.identity = checkpoint_identity(find_source("tiny"))
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models, response_model=None)
        self.app.add_api_route("/health", self.models, response_model=None)
        self.app.add_api_route("/inference/v1/generate", self.generate, methods=["POST"], response_model=None)

    async def models(self) -> Response:
        if self.fault == "key":
            return JSONResponse({}, 401)
        if self.fault == "garbage":
            return Response("<html>")
        return JSONResponse({"data": [{"id": "served", "max_model_len": 2048}]})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.fault == "no-route":
            return JSONResponse({}, 404)
        if self.fault == "broken":
            return JSONResponse({}, 500)
        if self.fault == "full":
            return JSONResponse({}, 429, {"Retry-After": "7"})
        images = [_image(part["url"]) for part in body.get("content_parts", [])]
        if body.get("stream"):
            tokens = await asyncio.to_thread(self.decoder.tokens, body["token_ids"], images, body["sampling_params"])
            return StreamingResponse(self.stream(tokens), media_type="text/event-stream")
        reply = {
            "engine": self.identity | {"other-base": {"base": "x"}, "other-heads": {"heads": "x"}}.get(self.fault, {})
        }
        if params := body["kv_transfer_params"]["qzoom"]:
            reply |= await asyncio.to_thread(self.decoder.look, body["token_ids"], images, params)
        tokens = await asyncio.to_thread(self.decoder.tokens, body["token_ids"], images, {"max_tokens": 1})
        said = {
            "choices": [{"token_ids": tokens, "finish_reason": "length"}],
            "usage": {"prompt_tokens_details": {"cached_tokens": 32}},
            "kv_transfer_params": None if self.fault == "no-plugin" else {"qzoom": reply},
        }
        return JSONResponse(said)

    async def stream(self, tokens: list[int]) -> AsyncGenerator[str, None]:
        for i, token in enumerate(tokens):
            if i == 2 and self.fault == "cut":
                return
            if i == 2 and self.fault == "error":
                yield 'data: {"error": {"message": "out of memory"}}\n\n'
            finish = "stop" if i == len(tokens) - 1 else None
            choice = {"index": 0, "token_ids": [token], "finish_reason": finish}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        details = {"prompt_tokens_details": {"cached_tokens": 32}}
        yield f"data: {json.dumps({'choices': [], 'usage': details})}\n\ndata: [DONE]\n\n"


def _image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """An application on a real port."""
    listener = bind("127.0.0.1", port)
    listener.listen()  # who connects before the server runs waits, and is not refused
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
