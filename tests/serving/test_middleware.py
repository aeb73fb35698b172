import base64
import contextlib
import hashlib
import json
import socket
import threading

import httpx
import pytest
import uvicorn
from starlette.routing import Route

from qzoom.errors import ConfigError
from qzoom.serving.middleware import OPEN_PATHS, TENANT, ApiKeyMiddleware, BodyLimitMiddleware, release_body_slot
from qzoom.serving.server import guarded_protocol
from qzoom.serving.settings import ServerLimits, ServerSettings
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
        *("", "Bearer", "Bearer first-ke", "Bearer first-keys", "Bearer FIRST-KEY", "Bearer \xe9"),
        *("first-key", "Token first-key", "Basic !!!"),
        *("Basic " + base64.b64encode(b"first-key").decode(), basic("first-key", "")),
    ],
)
def test_anything_else_does_not(guarded, header):
    headers = [(b"Authorization", header.encode("latin-1"))]
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401


def test_two_headers_are_one_too_many_and_only_pages_ask_for_a_password(guarded):
    headers = [("Authorization", "Bearer nope"), ("Authorization", "Bearer first-key")]
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401
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


class Echo:
    """Answers with the length of the body; on /hold it waits for `go` first, on /free after giving its place back."""

    def __init__(self):
        self.go = threading.Event()
        self.arrived = threading.Semaphore(0)
        self.reasons = []

    async def __call__(self, scope, receive, send):
        import asyncio

        if scope["type"] != "http":
            return
        message = await receive()
        if message["type"] == "http.request":
            assert not message["more_body"]
        if scope["path"] == "/free":
            release_body_slot(scope)
            release_body_slot(scope)
        self.arrived.release()
        if scope["path"] in ("/hold", "/free"):
            await asyncio.get_running_loop().run_in_executor(None, self.go.wait, 60)
        reply = str(len(message["body"])).encode()
        headers = [(b"content-length", str(len(reply)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})


@contextlib.contextmanager
def serving(**options):
    limits = ServerLimits(**{"body_bytes": 1000, "body_timeout_s": 60.0, "header_timeout_s": 60.0, **options})
    app = Echo()
    config = uvicorn.Config(
        BodyLimitMiddleware(app, limits, app.reasons.append),
        http=guarded_protocol(limits),
        lifespan="off",
        log_config=None,
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield app, listener.getsockname()
    finally:
        app.go.set()
        server.should_exit = True
        thread.join(30)
        listener.close()


def connect(address):
    return socket.create_connection(address, timeout=60)


def answer(connection):
    """Status, headers and body of all that comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def error_of(connection):
    status, headers, body = answer(connection)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"], headers


def post(address, body, path="/", headers=""):
    connection = connect(address)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)
    return connection


def good(address):
    with post(address, b"abc") as connection:
        status, _, body = answer(connection)
    assert (status, body) == (200, b"3")


def test_bodies_up_to_the_limit_arrive_whole():
    with serving() as (_, address):
        for size in (0, 1, 1000):
            with post(address, b"x" * size) as connection:
                assert answer(connection)[::2] == (200, str(size).encode())
        with connect(address) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer(connection)[::2] == (200, b"0")
        with connect(address) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            assert answer(connection)[::2] == (200, b"5")


@pytest.mark.parametrize("length", [b"1001", b"9" * 18, b"9" * 19])
def test_a_length_above_the_limit_is_refused_before_the_body(length):
    with serving() as (app, address):
        with connect(address) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n")
            status, code, _ = error_of(connection)
        assert (status, code) == (413, "body_too_large")
        assert app.reasons == ["body_too_large"]
        good(address)


def test_bytes_are_counted_however_they_come():
    with serving() as (_, address):
        with post(address, b"x" * 1500) as connection:
            assert error_of(connection)[:2] == (413, "body_too_large")
        good(address)
    with serving() as (_, address):
        with connect(address) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"64\r\n" + b"x" * 100 + b"\r\n")
            assert error_of(connection)[:2] == (413, "body_too_large")
        good(address)


@pytest.mark.parametrize("start", [b"", b"abc"])
def test_a_body_that_dawdles_gets_408(start):
    with serving(body_timeout_s=0.5) as (app, address):
        with connect(address) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" + start)
            assert error_of(connection)[:2] == (408, "body_timeout")
        assert app.reasons == ["body_timeout"]


def test_places_are_given_in_turn_and_given_back():
    with serving(reading=1, body_timeout_s=2.0) as (app, address):
        first = post(address, b"x", "/hold")
        assert app.arrived.acquire(timeout=60)
        with post(address, b"x") as second:
            status, code, headers = error_of(second)
        assert (status, code, headers["retry-after"]) == (429, "too_many_requests", "1")
        app.go.set()
        assert answer(first)[0] == 200
        good(address)
    with serving(reading=1) as (app, address):
        first = post(address, b"x", "/free")
        assert app.arrived.acquire(timeout=60)
        good(address)
        app.go.set()
        assert answer(first)[0] == 200
    with serving(reading=1) as (_, address):
        for _ in range(3):
            connection = connect(address)
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            connection.close()
        good(address)


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA: "])
def test_headers_that_dawdle_get_408(start):
    with serving(header_timeout_s=0.5) as (_, address), connect(address) as connection:
        connection.sendall(start)
        assert error_of(connection)[:2] == (408, "header_timeout")


def test_headers_that_dribble_get_408():
    with serving(header_timeout_s=0.5) as (_, address), connect(address) as connection:
        connection.settimeout(0.05)
        received = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    received = connection.recv(65536)
                    break
        assert received.startswith(b"HTTP/1.1 408 ")


def test_every_request_of_a_connection_is_watched_but_no_answer():
    with serving(header_timeout_s=0.5) as (_, address), connect(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET / HT")
        assert error_of(connection)[:2] == (408, "header_timeout")
    with serving(header_timeout_s=0.3) as (app, address):
        connection = post(address, b"x", "/hold")
        assert app.arrived.acquire(timeout=60)
        timer = threading.Timer(1.0, app.go.set)
        timer.start()
        assert answer(connection)[0] == 200
        timer.join()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/x\r\n\r\n", b"GET /\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1e3\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_not_http_gets_400_in_the_same_shape(data):
    with serving() as (_, address):
        with connect(address) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            if len(data) < 100_000:
                connection.shutdown(socket.SHUT_WR)
                status, code, _ = error_of(connection)
                assert (status, code) in ((400, "invalid_http"), (501, "invalid_http"))
        good(address)


def test_broken_chunks_end_the_connection_and_free_the_place():
    with serving(reading=1) as (_, address):
        with connect(address) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
            status, _, body = answer(connection)
            assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
            assert "(illegal chunk header)" in json.loads(body)["error"]["message"]
        good(address)


def test_connections_above_the_limit_are_turned_away():
    with serving(connections=2) as (_, address):
        held = [connect(address), connect(address)]
        with connect(address) as third:
            assert error_of(third)[:2] == (503, "too_many_connections")
        held[0].close()
        held[1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer(held[1])[0] == 200
        held[1].close()
