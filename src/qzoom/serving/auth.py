"""The API key, asked of every address but /health and /ready (pure ASGI, outside of everything else).

A key comes as `Authorization: Bearer KEY`. A browser cannot send that when it opens the page, so the key is also taken
as the password of HTTP Basic, with any user name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from qzoom.errors import ConfigError
from qzoom.serving.errors import key_error

__all__ = ["OPEN_PATHS", "TENANT", "KeyGate", "check_keys"]

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
            await _refuse(scope, send)
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


async def _refuse(scope: Scope, send: Send) -> None:
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
