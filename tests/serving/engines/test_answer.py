import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from qzoom import QZoom
from qzoom.errors import ConfigError
from qzoom.serving.engines.answer import AnswerEngine
from qzoom.serving.settings import ServerSettings
from tests.serving.engines.simulated import serving
from tests.serving.running import Site, chat, idle, image_part, page, running, user, wait_until

BODY = chat(user(image_part(), "What is the total amount?"), qzoom={"zoom": "always"})


@contextmanager
def before(model: QZoom, url: str, **settings: Any) -> Iterator[Site]:
    known = ServerSettings(model_name="tiny", **settings)
    with running(AnswerEngine(model, known, f"{url}/v1", "other"), **settings) as site:
        yield site


def post(site: Site, **more: Any) -> httpx.Response:
    return httpx.post(f"{site.url}/v1/chat/completions", json=BODY | more, timeout=120)


def test_the_other_model_gets_both_views_and_counts_its_tokens(model):
    with running(model, model_name="other") as other, before(model, other.url) as site:
        reply = post(site).json()
        streamed = post(site, stream=True, stream_options={"include_usage": True}).text
        never = post(site, qzoom={"zoom": "never"}).json()
        ready = httpx.get(f"{site.url}/ready").json()
    own = model.ask(page(), "What is the total amount?", zoom="always", max_new_tokens=8)
    message = reply["choices"][0]["message"]
    assert [region["box"] for region in message["qzoom"]["regions"]] == [list(region.box) for region in own.regions]
    assert message["content"].strip()
    assert streamed.rstrip().endswith("data: [DONE]")
    assert never["usage"]["prompt_tokens"] < reply["usage"]["prompt_tokens"]
    assert 0 < reply["usage"]["completion_tokens"] <= 8
    assert not never["choices"][0]["message"]["qzoom"]["gate"]["zoomed"]
    assert ready == {"status": "ready"}


def test_ways_of_decoding_are_passed_on_or_refused(model):
    bodies: list[dict[str, Any]] = []
    app = endpoint(stream(TEXT), bodies)
    with serving(app) as url, before(model, url) as site:
        refused = post(site, top_k=5)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_k")
        post(site, presence_penalty=0.5)
    assert [body.get("presence_penalty") for body in bodies] == [0.5]


def endpoint(reply: Response, bodies: list[dict[str, Any]] | None = None) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": []})

    @app.post("/v1/chat/completions")
    async def completions(body: dict[str, Any]) -> Response:
        if bodies is not None:
            bodies.append(body)
        return reply

    return app


def stream(*lines: str) -> Response:
    return StreamingResponse(iter(f"data: {line}\n\n" for line in lines), media_type="text/event-stream")


CHOICE = {"index": 0, "delta": {"content": "7"}, "finish_reason": None}
TEXT = json.dumps({"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [CHOICE]})


@pytest.mark.parametrize(
    ("reply", "status", "sentence"),
    [
        (JSONResponse({"error": {"message": "at most 1 image"}}, 400), 502, "refuses the request (status 400)"),
        (JSONResponse({"error": {"message": "no"}}, 401), 502, "refuses the server's key"),
        (JSONResponse({"error": {"message": "slow"}}, 429, {"retry-after": "0"}), 429, "too many requests"),
        (JSONResponse({"error": {"message": "busy"}}, 429, {"retry-after": "Wed, 21 Oct"}), 429, "too many requests"),
        (JSONResponse({"error": {"message": "down"}}, 503, {"retry-after": "0"}), 503, "cannot be reached"),
        (PlainTextResponse("<html>"), 503, "ended in the middle"),
        (stream("{broken"), 502, "no answer"),
        (stream('{"choices": 5}'), 502, "no answer"),
        (stream(TEXT), 503, "ended in the middle"),
    ],
    ids=["two pictures", "key", "full", "date", "down", "page", "no json", "other json", "cut"],
)
def test_what_goes_wrong_there_is_one_sentence_here(model, reply, status, sentence):
    with serving(endpoint(reply)) as url, before(model, url) as site:
        response = post(site)
        assert (response.status_code, sentence in response.json()["error"]["message"]) == (status, True), response.text
        assert httpx.get(f"{site.url}/ready").status_code == 200


def test_an_endpoint_that_is_silent_costs_the_time_of_a_request(model):
    app, asked = endpoint(stream(TEXT)), threading.Event()

    @app.post("/slow/chat/completions")
    async def silent() -> None:
        asked.set()
        await asyncio.Event().wait()

    @app.get("/slow/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": []})

    known = ServerSettings(model_name="tiny", deadline_s=3.0)
    with serving(app) as url, running(AnswerEngine(model, known, f"{url}/slow", "other"), deadline_s=3.0) as site:
        late = post(site)
        assert (late.status_code, asked.is_set()) == (504, True)
        assert "in the time that a request has" in late.json()["error"]["message"]
        wait_until(lambda: idle(site))
        assert httpx.get(f"{site.url}/ready").status_code == 200


def test_a_wrong_address_or_key_is_found_at_start(model):
    settings = ServerSettings(model_name="tiny")
    with pytest.raises(ConfigError, match="Nobody answers at http"):
        AnswerEngine(model, settings, "http://127.0.0.1:9/v1", "other")
    with running(model, api_keys=("k",)) as other, pytest.raises(ConfigError, match="QZOOM_ANSWER_KEY"):
        AnswerEngine(model, settings, f"{other.url}/v1", "other", key="wrong")
