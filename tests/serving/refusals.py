"""Requests that must be refused, and what a refusal looks like."""

import base64
import http.client
import json
import struct
import zlib

from tests.serving.running import chat, image_part, user

CHAT, PERCEIVE = "/v1/chat/completions", "/v1/perceive"
JSON = {"Content-Type": "application/json"}
GOOD = chat(user(image_part(detail="low"), "What is the total amount?"), max_tokens=3)
MESSAGES = GOOD["messages"]


def send(site, body, path=CHAT, method="POST", headers=JSON):
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=120)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def check_error(status, raw):
    """The shape of a refusal, and that nothing of the server's inside is in it."""
    assert 400 <= status < 500, (status, raw[:300])
    record = json.loads(raw)
    assert set(record) == {"error"}
    error = record["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 1000
    assert error["type"] in ("invalid_request_error", "rate_limit_error")
    for secret in ("Traceback", "site-packages", "/src/", " at 0x", "pydantic"):
        assert secret not in raw.decode()
    return error


def expect(site, cases, status, code=None, path=CHAT):
    """Every case is refused with the status, and the code where one is given."""
    for body in cases:
        got, raw = send(site, body, path)
        shown = body[:200] if isinstance(body, bytes) else str(body)[:200]
        assert got == status, (got, raw[:300], shown)
        error = check_error(got, raw)
        if code is not None:
            assert error["code"] == code, (error, shown)


def ask(url):
    return GOOD | {"messages": [user({"type": "image_url", "image_url": {"url": url}}, "What is the date?")]}


def picture_url(data, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, extra=b"", rows=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
