"""The gate that every request body passes: how large, how slow, how many at once (pure ASGI, before any route runs).

A body is received whole, within its limits, and handed to the application in one piece. Put authentication outside of
it, so that only those who may ask can send bodies.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qzoom.serving.errors import ApiError
from qzoom.serving.limits import ServerLimits, body_too_large

__all__ = ["BodyGuard", "decoded"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

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
