"""Malformed requests by kind: HTTP itself, packed bodies, numbers that JSON or we do not have, deep JSON, wrong places,
wrong types, odd names, repeated keys. Each is refused, never with a 500, by a sentence that names what was sent.
"""

import copy
import json
import socket

import pytest

from tests.serving.refusals import CHAT, GOOD, JSON, PERCEIVE, check_error, send

WHOLE = json.dumps(GOOD)
POST = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
GET = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


def raw(site, request):
    """Status and body of the first reply on a connection that is then closed."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request.encode("utf-8"))
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    ("request_text", "status", "word"),
    [
        (f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{GET}\r\n", 400, "Transfer-Encoding"),
        (f"{POST}Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n", 400, "Content-Length"),
        (f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345", 400, "conflicting Content-Length"),
        (f"{POST}Content-Length: -5\r\n\r\n", 400, "bad Content-Length"),
        (f"{POST}Content-Length: five\r\n\r\n", 400, "bad Content-Length"),
        (f"{POST}Content-Length: +5\r\n\r\n12345", 400, "bad Content-Length"),
        (f"{POST}Content-Length: 0x5\r\n\r\n12345", 400, "bad Content-Length"),
        (f"{POST}Content-Length: 5, 5\r\n\r\n12345", 400, "not a JSON object"),
        (f"{POST}Content-Length: {'9' * 30}\r\n\r\n", 400, "bad Content-Length"),
        (f"{POST}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
        (f"{POST}Transfer-Encoding: identity\r\n\r\n", 400, "Transfer-Encoding"),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "chunk"),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400, "chunk"),
        (f"{POST}X-A: a\0b\r\n\r\n", 400, "header"),
        (f"{POST}Content Length: 3\r\n\r\n", 400, "header"),
        (f"{POST}Content-Length : 3\r\n\r\n", 400, "header"),
        (f"{POST}\r\n", 400, "empty"),
        (f"{POST}Content-Length: 2\r\n\r\n  ", 400, "empty"),
        (f"{POST}Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}", 415, "Content-Type"),
        (POST.replace("/json", "/jsonp") + "Content-Length: 2\r\n\r\n{}", 415, "Content-Type"),
        (POST.replace("POST", "post") + "Content-Length: 2\r\n\r\n{}", 405, "post"),
        (POST.replace("POST", "PATCH") + "Content-Length: 2\r\n\r\n{}", 405, "PATCH"),
        (GET.replace("Host: x\r\n", "") + "\r\n", 400, "Host"),
        (f"{GET}Host: y\r\n\r\n", 400, "Host"),
        (GET.replace("/health", "/heälth") + "\r\n", 400, "request line"),
        (GET.replace("GET", "TRACE") + "\r\n", 405, "TRACE"),
        (GET.replace("GET /health", "OPTIONS *") + "\r\n", 404, "*"),
        (GET.replace("GET /health", "CONNECT x:1") + "\r\n", 404, "x:1"),
        ("\x16\x03\x01\x02\x00\x01\r\n\r\n", 400, "request line"),
    ],
)
def test_http_that_is_none(server, request_text, status, word):
    got, body = raw(server, request_text)
    assert got == status, body
    assert word in check_error(got, body)["message"]


def test_a_whole_address_as_the_target_is_its_path(server):
    request = "GET http://any.example/health HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n"
    assert raw(server, request)[0] == 200


@pytest.mark.parametrize("path", [CHAT, PERCEIVE, "/v1/pages"])
@pytest.mark.parametrize(
    "encoding", ["gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "utf-8"]
)
def test_packed_bodies(server, path, encoding):
    status, body = send(server, GOOD, path, headers=JSON | {"Content-Encoding": encoding})
    assert status == 415
    assert f"Content-Encoding {encoding}" in check_error(status, body)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1e400"),
        ("temperature", "-1e999"),
        ("temperature", "1e308"),
        ("top_p", "1e-400"),
        ("top_k", "1e300"),
        ("max_tokens", "1e400"),
        ("max_tokens", str(2**63)),
        ("max_completion_tokens", str(10**300)),
        ("seed", str(2**64)),
        ("seed", str(-(2**63) - 1)),
        ("seed", "1e400"),
        ("stream", "1"),
        ("qzoom.gate_threshold", "1.0000001"),
        ("qzoom.max_visual_tokens", "1e400"),
        ("qzoom.max_visual_tokens", str(2**31)),
        ("qzoom.region_threshold", "-1e-300"),
    ],
)
def test_numbers_that_we_do_not_have(server, field, value):
    above, _, name = field.rpartition(".")
    entry = f'"{above}": {{"{name}": {value}}}' if above else f'"{name}": {value}'
    status, body = send(server, f"{WHOLE[:-1]}, {entry}}}".encode())
    assert status == 400
    error = check_error(status, body)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    "path",
    [
        ("messages",), ("messages", 0), ("messages", 0, "role"), ("messages", 0, "content", 0),
        ("messages", 0, "content", 0, "type"), ("messages", 0, "content", 0, "image_url"),
        ("messages", 0, "content", 0, "image_url", "url"), ("messages", 0, "content", 0, "image_url", "detail"),
        ("model",),
    ],
)  # fmt: skip
def test_wrong_types_at_every_level(server, path):
    body = copy.deepcopy({name: GOOD[name] for name in ("model", "messages")})
    place = body
    for step in path[:-1]:
        place = place[step]
    for value in (5, True, 1.5, [], {}, "\u00fc", [[]], [None]):
        place[path[-1]] = value
        for route in (CHAT, PERCEIVE):
            status, reply = send(server, body, route)
            assert status in (400, 404)
            assert check_error(status, reply)["param"].startswith(path[0])


@pytest.mark.parametrize(
    ("again", "status", "param"),
    [
        ('"model": "other"', 404, "model"),
        ('"messages": 5', 400, "messages"),
        ('"stream": 7', 400, "stream"),
        ('"qzoom": {"zoom": "never", "zoom": "x"}', 400, "qzoom.zoom"),
    ],
)
def test_of_a_repeated_key_the_last_value_counts(server, again, status, param):
    got, body = send(server, f"{WHOLE[:-1]}, {again}}}".encode())
    assert got == status
    assert check_error(got, body)["param"] == param
    assert send(server, f'{{{again}, {WHOLE[1:-1]}, "stream": null, "qzoom": null}}'.encode())[0] == 200
