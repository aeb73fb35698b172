"""Clients that dawdle or leave at any stage: nothing stays behind, and the next good request is answered as before."""

import contextlib
import json
import socket
import threading

import httpx
import pytest

from qzoom.images.fetch import FetchPolicy
from qzoom.serving.pictures import ReadingTime
from qzoom.serving.settings import ServerLimits
from tests.images.asset_server import assets
from tests.pdfs import pdf
from tests.serving.refusals import GOOD, MESSAGES, picture_url, send
from tests.serving.refusals import ask as ask_about
from tests.serving.running import idle, running, wait_until

LIMITS = ServerLimits(header_timeout_s=1.0, body_timeout_s=1.0, reading=2)


@pytest.fixture(scope="module")
def server(endless):
    with running(endless, limits=LIMITS) as site:
        yield site


def ask(site):
    status, raw = send(site, GOOD)
    assert status == 200, raw
    return json.loads(raw)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def good_text(server):
    return ask(server)


@pytest.fixture(autouse=True)
def _nothing_stays_behind(server, good_text):
    yield
    wait_until(lambda: idle(server))
    assert ask(server) == good_text


def head(length, path="/v1/chat/completions"):
    text = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return text.encode()


def connect(site):
    host, port = site.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=120)


def leave(connection, rudely):
    if rudely:  # a reset instead of an orderly end
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


LONG = json.dumps(GOOD | {"max_tokens": 1000, "stream": False}).encode()
STREAM = json.dumps(GOOD | {"max_tokens": 1000, "stream": True}).encode()
PERCEIVE = json.dumps({"model": "tiny", "messages": MESSAGES}).encode()
STAGES = {
    "at once": b"", "in the request line": b"POST /v1/chat", "in the headers": head(len(LONG))[:-10],
    "before the body": head(len(LONG)), "in the body": head(len(LONG)) + LONG[: len(LONG) // 2],
    "before the last byte": head(len(LONG)) + LONG[:-1], "with a whole request": head(len(LONG)) + LONG,
    "with a whole stream": head(len(STREAM)) + STREAM,
    "with a whole perception": head(len(PERCEIVE), "/v1/perceive") + PERCEIVE,
    "with two requests": (head(len(LONG)) + LONG) * 2,
}  # fmt: skip


@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("stage", list(STAGES))
def test_leaving(server, stage, rudely):
    for _ in range(3):
        connection = connect(server)
        connection.sendall(STAGES[stage])
        leave(connection, rudely)


@pytest.mark.parametrize("rudely", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_leaving_a_stream(server, chunks, rudely):
    connection = connect(server)
    connection.sendall(head(len(STREAM)) + STREAM)
    data = b""
    while data.count(b"data: ") < chunks:
        part = connection.recv(65536)
        assert part, data
        data += part
    leave(connection, rudely)


def test_leaving_while_the_model_works(server):
    connection = connect(server)
    connection.sendall(head(len(LONG)) + LONG)
    wait_until(lambda: server.service.engine.running > 0)
    leave(connection, False)


def test_more_dawdlers_than_places(server, good_text):
    connections = [connect(server) for _ in range(6)]
    for connection in connections:
        connection.sendall(head(len(LONG)) + LONG[:10])
    statuses = []
    for connection in connections:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                data += part
        connection.close()
        statuses.append(int(data.split()[1]))
        assert set(json.loads(data.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert set(statuses) <= {408, 429}
    assert 408 in statuses


def test_dawdling_headers(server):
    connections = [connect(server) for _ in range(20)]
    for connection in connections:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    assert ask(server)
    for connection in connections:
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        connection.close()


def document(number):
    return ask_about(picture_url(pdf([f"page {number}"]), "application/pdf"))


def status_of(site, body, path="/v1/chat/completions"):
    status, raw = send(site, body, path)
    return status, json.loads(raw).get("error", {}).get("code")


def test_a_place_is_free_when_its_thread_has_ended(model):
    go = threading.Event()

    def say_nothing(connection):
        asked.release()
        go.wait(120)

    asked = threading.Semaphore(0)
    limits = ServerLimits(reading=1, body_timeout_s=2.0)
    with assets({"/p.png": say_nothing}) as host:
        name = f"localhost:{host.port}"
        policy = FetchPolicy((name,), allow_http=True, allow_private=True, timeout_s=120.0, read_timeout_s=120.0)
        with running(model, limits=limits, fetch=policy) as site:
            connection = connect(site)
            body = json.dumps(ask_about(f"http://{name}/p.png")).encode()
            connection.sendall(head(len(body)) + body)
            assert asked.acquire(timeout=120)
            leave(connection, False)
            wait_until(lambda: site.service.in_flight == 0)
            assert status_of(site, GOOD) == (429, "too_many_requests")
            go.set()
            wait_until(lambda: status_of(site, GOOD) == (200, None))


def test_clients_that_leave_their_documents_hold_nobody_up(model):
    with running(model, limits=ServerLimits(reading=4)) as site, contextlib.ExitStack() as held:
        for _ in range(2):  # as two documents do that take long
            held.enter_context(site.service.pictures.drawers.hold(ReadingTime()))
        for number in range(12):
            connection = connect(site)
            body = json.dumps(document(number)).encode()
            connection.sendall(head(len(body)) + body)
            wait_until(lambda: site.service.in_flight == 1)
            leave(connection, False)
            wait_until(lambda: site.service.in_flight == 0)
        assert status_of(site, GOOD) == (200, None)
        held.close()
        assert status_of(site, document(99)) == (200, None)


def test_the_time_of_a_request_covers_the_wait_for_its_documents(model):
    with running(model, deadline_s=1.0) as site, contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(site.service.pictures.drawers.hold(ReadingTime()))
        file = {"model": "tiny", "file": {"file_data": picture_url(pdf(["a"]), "application/pdf")}}
        for body, path in ((document(0), "/v1/chat/completions"), (file, "/v1/pages")):
            assert status_of(site, body, path) == (504, "deadline_exceeded")
        assert httpx.get(f"{site.url}/ready").status_code == 200
