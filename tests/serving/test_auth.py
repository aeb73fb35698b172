"""With keys, every address but /health and /ready asks for one."""

import base64
import hashlib

import httpx
import pytest
from starlette.routing import Route

from qzoom.errors import ConfigError
from qzoom.serving.middleware import OPEN_PATHS, TENANT, ApiKeyMiddleware
from qzoom.serving.service import ServerSettings
from tests.serving.running import running

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(model):
    with running(model, api_keys=KEYS) as found:
        yield found


def basic(name, password):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def addresses(app):
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)
    return sorted({(method, route.path) for route in routes for method in route.methods})


def test_every_address_asks_for_a_key(guarded):
    found = addresses(guarded.server.config.app)
    assert {("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("GET", "/"), ("GET", "/metrics")} <= set(found)
    with httpx.Client(base_url=guarded.url) as http:
        for method, path in found:
            reply = http.request(method, path.replace("{name:path}", "tiny"))
            if path in OPEN_PATHS:
                assert reply.status_code == 200, path
            else:
                assert reply.status_code == 401, path
                assert "WWW-Authenticate" in reply.headers
                if method != "HEAD":
                    assert reply.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/nowhere").status_code == 401


@pytest.mark.parametrize(
    "header", [f"Bearer {KEYS[0]}", f"bearer {KEYS[1]}", basic("anyone", KEYS[0]), basic("", KEYS[1])]
)
@pytest.mark.parametrize("path", ["/v1/models", "/", "/metrics", "/openapi.json"])
def test_any_of_the_keys_opens(guarded, header, path):
    assert httpx.get(guarded.url + path, headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-keys",
        "Bearer FIRST-KEY",
        "first-key",
        "Token first-key",
        "Basic !!!",
        "Basic " + base64.b64encode(b"first-key").decode(),
        basic("first-key", ""),
        "Bearer \xe9",
    ],
)
def test_anything_else_does_not(guarded, header):
    headers = [(b"Authorization", header.encode("latin-1"))]
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401


def test_two_headers_are_one_too_many(guarded):
    headers = [("Authorization", "Bearer nope"), ("Authorization", "Bearer first-key")]
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401


def test_a_browser_is_asked_for_a_password_but_the_pages_calls_are_not(guarded):
    assert httpx.get(f"{guarded.url}/").headers["WWW-Authenticate"].startswith("Basic ")
    assert httpx.get(f"{guarded.url}/v1/models").headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["", " ", "two words", "line\nbreak", "schlüssel"])
def test_keys_that_no_header_carries_are_refused(key):
    with pytest.raises(ConfigError, match="API key 2"):
        ServerSettings("tiny", api_keys=("good", key))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_tenant_is_the_keys_digest(anyio_backend):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope[TENANT])

    def scope(key):
        return {"type": "http", "path": "/", "headers": [(b"authorization", b"Bearer " + key.encode())]}

    for key in KEYS:
        await ApiKeyMiddleware(app, KEYS)(scope(key), None, None)
    await ApiKeyMiddleware(app, ())(scope("whatever"), None, None)
    assert seen == [*(hashlib.sha256(key.encode()).hexdigest() for key in KEYS), ""]
