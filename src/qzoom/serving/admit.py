"""Who may still come in while the server stops, and how every request to the model ended (pure ASGI)."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qzoom.errors import StoppingError
from qzoom.serving.errors import from_exception
from qzoom.serving.service import Service

__all__ = ["Admission"]


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
            await _refuse(error, send)
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


async def _refuse(error: StoppingError, send: Send) -> None:
    refusal = from_exception(error)
    body = json.dumps(refusal.body()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    raw = [(k.lower().encode("ascii"), v.encode("ascii")) for k, v in (headers | refusal.headers).items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
