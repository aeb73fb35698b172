"""The gate that every request body passes: how large, how slow, how many at once (pure ASGI, before any route runs).

A body is received whole, within its limits, and handed to the application in one piece. Put authentication outside of
it, so that only those who may ask can send bodies.

The API key, asked of every address but /health and /ready (pure ASGI, outside of everything else).

A key comes as `Authorization: Bearer KEY`. A browser cannot send that when it opens the page, so the key is also taken
as the password of HTTP Basic, with any user name.

Who may still come in while the server stops, and how every request to the model ended (pure ASGI).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qzoom.errors import ConfigError, StoppingError
from qzoom.serving.errors import ApiError, from_exception, key_error
from qzoom.serving.limits import ServerLimits, body_too_large

if TYPE_CHECKING:
    from qzoom.serving.service import Service

__all__ = ["OPEN_PATHS", "TENANT", "Admission", "BodyGuard", "KeyGate", "check_keys", "decoded"]


_PLACE = "qzoom.place"
_LINGER_S = 2.0


class BodyGuard:
    """Receives request bodies within `ServerLimits`; refusals are answered in OpenAI's error shape.

    413: more than `body_bytes`, by Content-Length or as they stream in. 408: not there within `body_timeout_s`.
    429: no place became free in that time, since `reading` requests are being received or decoded. A request keeps its
    place until `decoded` is called for it, or else until it ends.

    Args:
        app: the application.
        limits: the server's limits.
        on_refusal: called with a short reason, as "body_too_large", for the metrics.
    """

    def __init__(self, app: Any, limits: ServerLimits, on_refusal: Callable[[str], None] | None = None) -> None:
        self._app = app
        self._limits = limits
        self._on_refusal = on_refusal
        self._places = asyncio.Semaphore(limits.reading)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        place = _Place(self._places)
        try:
            body = await self._admit(scope, receive, place)
            if body is not None:
                scope[_PLACE] = place
                await self._app(scope, _replay([body], receive), send)
        except _Refusal as refusal:
            place.release()
            if self._on_refusal is not None:
                self._on_refusal(refusal.error.code)
            await _refuse(refusal.error, receive, send, 2 * self._limits.body_bytes)
        finally:
            place.release()

    async def _admit(self, scope: Scope, receive: Receive, place: _Place) -> bytes | None:
        """The whole body; None when the client has left."""
        for name, value in scope["headers"]:
            if name == b"content-length" and (len(value) > 18 or int(value) > self._limits.body_bytes):
                raise _Refusal(body_too_large(self._limits))
        timeout = self._limits.body_timeout_s
        try:
            async with asyncio.timeout(timeout):
                await place.acquire()
                return await self._read(receive)
        except TimeoutError as error:
            if place.held:
                text = f"The body did not arrive within {timeout:g} seconds; send it faster or make it smaller."
                raise _Refusal(ApiError(408, text, code="body_timeout")) from error
            text = "Too many requests are being received at once; try again in a moment."
            raise _Refusal(ApiError(429, text, code="too_many_requests", headers={"Retry-After": "1"})) from error

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise _Refusal(body_too_large(self._limits))
            if not message.get("more_body", False):
                return bytes(body)


class _Refusal(Exception):
    """Carries this guard's own refusals past those of the application."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class _Place:
    """One of the places for requests that are being received or decoded."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self.held = False

    async def acquire(self) -> None:
        await self._places.acquire()
        self.held = True

    def release(self) -> None:
        if self.held:
            self.held = False
            self._places.release()


def decoded(scope: Scope) -> None:
    """Give a request's place to the next one: its body is read and its pictures are decoded. May be repeated.

    Args:
        scope: the request's ASGI scope; call it on the event loop.
    """
    place = scope.get(_PLACE)
    if place is not None:
        place.release()


def _has_body(scope: Scope) -> bool:
    """Whether the headers announce a body; without them HTTP/1.1 has none."""
    names = dict(scope["headers"])
    return b"transfer-encoding" in names or names.get(b"content-length", b"0").strip(b"0") != b""


def _replay(body: list[bytes], receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what the server reports, as a client that leaves."""

    async def next_message() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        return await receive()

    return next_message


async def _refuse(error: ApiError, receive: Receive, send: Send, most_bytes: int) -> None:
    """Answer and close; what the client still sends is thrown away for a moment, so that it gets to read the answer."""
    body = json.dumps(error.body()).encode("ascii")
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    raw = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            while most_bytes > 0:
                message = await receive()
                most_bytes -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


OPEN_PATHS = ("/health", "/ready")
TENANT = "qzoom.tenant"


def check_keys(keys: Sequence[str]) -> None:
    """Refuse keys that no header can carry, among them the empty one of an unset variable.

    Raises:
        ConfigError: it names the key's number, never the key.
    """
    for number, key in enumerate(keys, start=1):
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"API key {number} is empty or has characters that a header cannot carry; use printable ASCII without "
                "spaces."
            )


class KeyGate:
    """Lets through who has a key, and names the tenant: the key's digest, or "" on a server without keys.

    Args:
        app: the application.
        keys: the keys; none leaves the server open.

    Raises:
        ConfigError: a key that no header can carry.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        check_keys(keys)
        self._app = app
        self._digests = [hashlib.sha256(key.encode("ascii")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tenant = "" if not self._digests else self._tenant(scope)
        if tenant is None and scope["path"] not in OPEN_PATHS:
            await _refuse_auth(scope, send)
            return
        scope[TENANT] = tenant or ""
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        key = _key_of(sent[0]) if len(sent) == 1 else None
        if key is None:
            return None
        digest = hashlib.sha256(key).digest()
        # All keys are compared, each in constant time: the time taken says neither how near nor which one.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else None


def _key_of(header: bytes) -> bytes | None:
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            _, colon, password = base64.b64decode(value.strip(), validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return None
        return password if colon else None
    return None


async def _refuse_auth(scope: Scope, send: Send) -> None:
    body = json.dumps(key_error().body()).encode()
    # Only addresses that a person opens make the browser ask; the page's own calls must not.
    basic = not scope["path"].startswith("/v1/")
    challenge = b'Basic realm="qzoom: any name, the API key as password", charset="UTF-8"' if basic else b"Bearer"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"www-authenticate", challenge),
        (b"connection", b"close"),
    ]
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1008})


class Admission:
    """Counts what is under way, from the first byte of a body to the last of its answer; refuses once draining.

    Args:
        app: the application.
        service: keeps the count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._service.enter()
        except StoppingError as error:
            await _refuse_admit(error, send)
            return
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._service.leave()
            self._service.metrics.ended(status)


async def _refuse_admit(error: StoppingError, send: Send) -> None:
    refusal = from_exception(error)
    body = json.dumps(refusal.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    raw = [(k.lower().encode("ascii"), v.encode("ascii")) for k, v in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
