import json
import socket
from contextlib import ExitStack

import httpx
import pytest
from openai import BadRequestError

from qzoom.errors import ConfigError
from qzoom.serving.engines.base import ServingEngine
from qzoom.serving.engines.native import NativeEngine
from qzoom.serving.replies import token_bytes
from qzoom.serving.settings import ServerLimits, ServerSettings
from tests.serving.running import chat, page, running

QUESTION = "What is the total amount?"
NEVER = {"qzoom": {"zoom": "never"}}
SCHEMA = {
    "type": "object",
    "properties": {
        "date": {"type": "string", "pattern": "^[0-9]{2}/[0-9]{2}/[0-9]{4}$"},
        "kind": {"enum": ["receipt", "invoice"]},
    },
    "required": ["date", "kind"],
    "additionalProperties": False,
}

FORM = {"type": "json_object"}


def test_log_probabilities_whole_and_streamed_are_the_librarys(client, model):
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never", logprobs=3)
    tokenizer = model.engine.backbone.tokenizer
    asked = chat(logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked, extra_body=NEVER).choices[0].logprobs.content
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=NEVER))
    streamed = [entry for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content]
    for entries in (whole, streamed):
        assert len(entries) == len(own.logprobs)
        for entry, item in zip(entries, own.logprobs, strict=True):
            assert bytes(entry.bytes) == token_bytes(tokenizer, item.token)
            assert entry.logprob == pytest.approx(item.logprob, abs=1e-4)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx([v for _, v in item.top], abs=1e-4)
    assert b"".join(bytes(entry.bytes) for entry in whole).decode().strip() == own.text
    plain = client.chat.completions.create(**chat(), extra_body=NEVER)
    assert plain.choices[0].logprobs is None


@pytest.mark.parametrize("text", ["Total \u00e9\u4e2d \U0001f642", " a\n\tb", "12.50"])
def test_tokens_as_bytes_join_to_the_text(model, text):
    tokenizer = model.engine.backbone.tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_those_of_their_seeds(client, model, stream):
    more = {"temperature": 1.5, "seed": 11}
    own = [model.ask(page(), QUESTION, max_new_tokens=8, zoom="never", temperature=1.5, seed=11 + i) for i in range(3)]
    if stream:
        texts, ends = ["", "", ""], [None] * 3
        options = {"stream_options": {"include_usage": True}}
        for chunk in client.chat.completions.create(**chat(n=3, **more), stream=True, **options, extra_body=NEVER):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends[choice.index]
            usage = chunk.usage
    else:
        reply = client.chat.completions.create(**chat(n=3, **more), extra_body=NEVER)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in reply.choices]
        ends = [choice.finish_reason for choice in reply.choices]
        usage = reply.usage
    assert texts == [answer.text for answer in own]
    assert ends == [answer.finish_reason for answer in own]
    assert usage.prompt_tokens == own[0].usage.prompt_tokens
    assert usage.completion_tokens == sum(answer.usage.completion_tokens for answer in own)


def test_answers_by_schema(client):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "page", "schema": SCHEMA, "strict": True}}
    options = {"response_format": form, "extra_body": NEVER}
    whole = client.chat.completions.create(**chat(max_tokens=60), **options).choices[0]
    assert whole.finish_reason == "stop"
    assert set(json.loads(whole.message.content)) == {"date", "kind"}
    pieces = client.chat.completions.create(**chat(max_tokens=60), **options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.message.content
    cut = client.chat.completions.create(**chat(max_tokens=5), **options).choices[0]
    assert cut.finish_reason == "length"
    assert whole.message.content.startswith(cut.message.content)
    options["response_format"] = {"type": "json_object"}
    assert client.chat.completions.create(**chat(max_tokens=60), **options).choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    ("form", "param", "word"),
    [
        ({"type": "json_schema"}, "response_format.json_schema", "missing"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema", "missing"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "response_format.json_schema.schema", "object"),
        ({"type": "grammar"}, "response_format", "json_object"),
        ({}, "response_format", "json_object"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "response_format", "not"),
        ({"type": "json_schema", "json_schema": {"schema": {"a": "x" * 70_000}}}, "response_format", "characters"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(client, form, param, word):
    pytest.importorskip("llguidance")
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**chat(), response_format=form)
    assert caught.value.param == param
    assert word in caught.value.message


@pytest.mark.parametrize("more", [{"logprobs": True}, {"response_format": FORM}])
def test_an_engine_without_them_refuses(http, monkeypatch, more):
    monkeypatch.setattr(NativeEngine, "refused", ServingEngine.refused)
    reply = http.post("/v1/chat/completions", json=chat(**more))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] in more
    assert http.post("/v1/chat/completions", json=chat(max_tokens=1)).status_code == 200


def test_penalties_equal_the_librarys(client, model):
    more = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    own = model.ask(page(), QUESTION, max_new_tokens=8, zoom="never", **more)
    reply = client.chat.completions.create(**chat(**more), extra_body=NEVER)
    assert reply.choices[0].message.content == own.text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_allowed_are_cut_unless_strict(endless, name):
    body = chat(ignore_eos=True, **NEVER)
    del body["max_tokens"]
    with running(endless, limits=ServerLimits(max_new_tokens=5)) as site:
        reply = httpx.post(f"{site.url}/v1/chat/completions", json=body | {name: 4096}, timeout=120).json()
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 5)
    with running(endless, limits=ServerLimits(max_new_tokens=5), strict_max_tokens=True) as site:
        reply = httpx.post(f"{site.url}/v1/chat/completions", json=body | {name: 4096}, timeout=120)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/responses", "/v1/embeddings", "/chat/completions", "/v1/completions/"]
)
def test_other_routes_name_the_right_one(http, method, path):
    reply = http.request(method, path, json={})
    assert reply.status_code == 404
    assert "/v1/chat/completions" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "same"), [("abc-123", True), ("", False), ("x" * 129, False), ("a b", False), (None, False)]
)
def test_every_reply_has_an_id(http, client, sent, same):
    headers = {} if sent is None else {"X-Request-Id": sent}
    for path in ("/health", "/nowhere", "/v1/models"):
        reply = http.get(path, headers=headers)
        assert (reply.headers["x-request-id"] == sent) is same
        assert len(reply.headers["x-request-id"]) >= 7
    assert client.chat.completions.create(**chat(max_tokens=1))._request_id


def test_a_path_of_a_proxy(model):
    with running(model, root_path="/look/here", api_keys=("key",)) as site, httpx.Client(base_url=site.url) as http:
        headers = {"Authorization": "Bearer key"}
        for path in ("/v1/models", "/look/here/v1/models", "/look/here/", "/look/here"):
            assert http.get(path, headers=headers).status_code == 200, path
        assert http.get("/look/here/health").status_code == 200
        assert http.get("/look/here/v1/models").status_code == 401
        assert http.get("/look/hereafter", headers=headers).status_code == 404
        assert http.get("/openapi.json", headers=headers).json()["servers"] == [{"url": "/look/here"}]


@pytest.mark.parametrize("path", ["look", "/", "/a/", "/a b", "/a?b", "//a", "https://x/a"])
def test_what_is_no_path_of_a_proxy_is_refused(path):
    with pytest.raises(ConfigError, match="not a root path"):
        ServerSettings("tiny", root_path=path)


def test_health_answers_while_all_places_are_taken(model):
    with running(model, limits=ServerLimits(connections=3)) as site, ExitStack() as held:
        address = ("127.0.0.1", int(site.url.rpartition(":")[2]))
        for _ in range(3):
            connection = held.enter_context(socket.create_connection(address, timeout=60))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        for path, status in (("/health", 200), ("/ready", 200), ("/v1/models", 503), ("/health", 200)):
            reply = httpx.get(f"{site.url}{path}")
            assert (reply.status_code, reply.headers["connection"]) == (status, "close")
        assert httpx.get(f"{site.url}/v1/models").json()["error"]["code"] == "too_many_connections"
