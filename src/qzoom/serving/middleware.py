"""What a request passes before its route, outermost first: origin, address, API key, drain, body limits (pure ASGI).

The key comes first, so that only clients with one can send bodies. A body is received whole, within its limits, and
handed to the application in one piece.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qzoom.errors import StoppingError
from qzoom.serving.errors import ApiError, body_too_large, from_exception, key_error, too_many_connections
from qzoom.serving.settings import ServerLimits

if TYPE_CHECKING:
    from qzoom.serving.service import Service

OPEN_PATHS = ("/health", "/ready")
TENANT = "qzoom.tenant"
REQUEST_ID = "qzoom.request_id"

_SLOT = "qzoom.body_slot"
_LINGER_S = 2.0


class OriginMiddleware:
    """Lets pages of other origins read answers (CORS), for the origins that are allowed; none are by default.
    `origins`: as "https://app.example", or "*" for every one."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = [origin.lower().encode("ascii") for origin in origins]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not self._origins:
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"])
        origin = sent.get(b"origin", b"")
        allowed = bool(origin) and (b"*" in self._origins or origin.lower() in self._origins)
        headers = [(b"vary", b"Origin")]
        if allowed:
            headers.append((b"access-control-allow-origin", origin))
            headers.append((b"access-control-expose-headers", b"Retry-After, X-Request-Id"))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        if allowed and scope["method"] == "OPTIONS" and b"access-control-request-method" in sent:
            # The browser asks before it sends a request, and without a key.
            wanted = sent.get(b"access-control-request-headers", b"authorization, content-type")
            headers += [
                (b"access-control-allow-methods", b"GET, HEAD, POST"),
                (b"access-control-allow-headers", wanted),
            ]
            headers += [(b"access-control-max-age", b"600")]
            await with_headers({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, with_headers)


class AddressMiddleware:
    """Reads what a request is addressed to as RFC 9112 wants it, and gives it an id.

    HEAD is answered as GET is, without the body, which the server leaves out. `http://host/path` is `/path`, and a last
    slash does not matter. A request with both Content-Length and Transfer-Encoding is refused and its connection
    closed, since a proxy may have read another end of it than this server would.

    Every reply has the header `X-Request-Id`: the request's own where it has a usable one, else a new one.

    Args:
        root_path: path under which a proxy shows the server; it is taken off where the proxy has left it on.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not re.fullmatch(rb"[!-~]{1,128}", request_id):
            request_id = uuid.uuid4().hex.encode("ascii")

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        if {b"content-length", b"transfer-encoding"} <= headers.keys():
            text = "The request has both Content-Length and Transfer-Encoding; send one of them."
            await _respond(ApiError(400, text, code="invalid_http"), with_id)
            return
        path: str = scope["path"]
        if absolute := re.match(r"https?://[^/]+", path, re.IGNORECASE):
            path = path[absolute.end() :] or "/"
        if f"{path}/".startswith(f"{self._root_path}/"):
            path = path[len(self._root_path) :] or "/"
        if path.endswith("/") and not path.endswith("//"):
            path = path[:-1] or "/"
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        own = {"path": path, "method": method, REQUEST_ID: request_id.decode("ascii")}
        await self._app({**scope, **own}, receive, with_id)


def only_health(app: ASGIApp) -> ASGIApp:
    """The application for connections beyond the limit: probes are answered, anything else is told to come again."""

    async def spare(scope: Scope, receive: Receive, send: Send) -> None:
        async def and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            await _respond(too_many_connections(), send)
        else:
            await app(scope, receive, and_close)

    return spare


class ApiKeyMiddleware:
    """Requires an API key on every path but `OPEN_PATHS` and sets the tenant: the key's digest, or "" without keys.

    A key comes as `Authorization: Bearer KEY`. A browser cannot send that when it opens the page, so the key is also
    taken as the password of HTTP Basic, with any user name.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode("ascii")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope) if self._digests else ""
        if tenant is None and scope["path"] not in OPEN_PATHS:
            # Only addresses that a person opens make the browser ask; the page's own calls must not.
            basic = 'Basic realm="qzoom: any name, the API key as password", charset="UTF-8"'
            error = key_error("Bearer" if scope["path"].startswith("/v1/") else basic)
            if scope["type"] == "http":
                await _respond(error, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        scope[TENANT] = tenant or ""
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        key = _key_of(headers[0]) if len(headers) == 1 else None
        if key is None:
            return None
        digest = hashlib.sha256(key).digest()
        # All keys are compared, each in constant time: the time taken says neither how near nor which one.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else None


class DrainMiddleware:
    """Rejects POST requests while the server drains, counts those in flight, and counts responses by status.

    A request is in flight from the first byte of its body to the last of its answer.
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
            self._service.begin_request()
        except StoppingError as error:
            await _respond(from_exception(error), send)
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
            self._service.end_request(status)


class BodyLimitMiddleware:
    """Receives request bodies within `ServerLimits`.

    413: more than `body_bytes`, by Content-Length or as they stream in. 408: not complete within `body_timeout_s`.
    429: no slot became free in that time, since `reading` requests are being received or decoded. A request keeps its
    slot until `release_body_slot` is called for it, or else until it ends; one that is being read by a thread keeps it
    until the thread is done, whether its client still waits or not.

    Args:
        on_refusal: called with a short reason, as "body_too_large", for the metrics.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits, on_refusal: Callable[[str], None]) -> None:
        self._app = app
        self._limits = limits
        self._on_refusal = on_refusal
        self._slots = asyncio.Semaphore(limits.reading)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        with ExitStack() as slot:
            try:
                body = await self._receive(scope, receive, slot)
            except ApiError as error:
                slot.close()
                self._on_refusal(error.code)
                await _respond(error, send, receive, 2 * self._limits.body_bytes)
                return
            if body is not None:
                scope[_SLOT] = slot
                await self._app(scope, _replay([body], receive), send)

    async def _receive(self, scope: Scope, receive: Receive, slot: ExitStack) -> bytes | None:
        """The whole body; None when the client has disconnected."""
        for name, value in scope["headers"]:
            if name == b"content-length" and (len(value) > 18 or int(value) > self._limits.body_bytes):
                raise body_too_large(self._limits.body_bytes)
        timeout, has_slot = self._limits.body_timeout_s, False
        try:
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
                slot.callback(self._slots.release)
                has_slot = True
                return await self._read(receive)
        except TimeoutError as error:
            if has_slot:
                text = f"The body did not arrive within {timeout:g} seconds; send it faster or make it smaller."
                raise ApiError(408, text, code="body_timeout") from error
            text = "Too many requests are being received at once; try again in a moment."
            raise ApiError(429, text, code="too_many_requests", headers={"Retry-After": "1"}) from error

    async def _read(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise body_too_large(self._limits.body_bytes)
            if not message.get("more_body", False):
                return bytes(body)


def release_body_slot(scope: Scope, work: Future[Any] | None = None) -> None:
    """Give a request's slot to the next one: its body is read and its pictures are decoded. May be repeated. `work`:
    a thread's part of the reading, which may go on although the request has ended; the slot is given when it is done.
    """
    if _SLOT not in scope:
        return
    slot: ExitStack = scope[_SLOT].pop_all()
    if work is None or work.done():
        slot.close()
        return
    loop = asyncio.get_running_loop()

    def give(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(slot.close)

    work.add_done_callback(give)


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


def _has_body(scope: Scope) -> bool:
    """Whether the headers announce a body; without them HTTP/1.1 has none."""
    names = dict(scope["headers"])
    return b"transfer-encoding" in names or names.get(b"content-length", b"0").strip(b"0") != b""


def _replay(body: list[bytes], receive: Receive) -> Receive:
    """A `receive` that gives the body once and then what the server reports, such as a disconnect."""

    async def next_message() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        return await receive()

    return next_message


async def _respond(error: ApiError, send: Send, receive: Receive | None = None, unread_bytes: int = 0) -> None:
    """Send an error and close the connection.

    Args:
        receive: of the request, if its body may still be arriving: it is read and dropped for a moment, since a client
            whose sending fails does not read the response.
        unread_bytes: most bytes to read and drop.
    """
    headers, body = error.encoded()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": receive is not None})
    if receive is None:
        return
    try:
        async with asyncio.timeout(_LINGER_S):
            while unread_bytes > 0:
                message = await receive()
                unread_bytes -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
