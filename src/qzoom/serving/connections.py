"""uvicorn's HTTP/1.1 protocol with what it lacks: a time limit for headers and a ceiling on connections.

Pass `guarded_protocol(limits)` as `uvicorn.Config(http=...)`. What is refused here never reaches the application, so
the answers in OpenAI's error shape are written here.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qzoom.serving.errors import ApiError
from qzoom.serving.limits import ServerLimits

__all__ = ["guarded_protocol"]


def guarded_protocol(limits: ServerLimits) -> type[H11Protocol]:
    """The protocol class for one server's limits.

    Args:
        limits: `header_timeout_s` and `connections` are used.
    """
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits})


class _GuardedProtocol(H11Protocol):
    """Closes connections whose headers dawdle (408), are not HTTP (400), or are one too many (503)."""

    limits: ServerLimits
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._close_with(503, "The server has too many connections; try again in a moment.", "too_many_connections")
        else:
            self._watch_headers()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._close_with(400, "The request is not valid HTTP/1.1; check the client or proxy.", "invalid_http")

    def _watch_headers(self) -> None:
        """Run the timer while, and only while, a request is awaited whose headers are not complete."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_watch()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_timeout_s, self._headers_late)

    def _stop_watch(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        seconds = self.limits.header_timeout_s
        text = f"The request's headers did not arrive within {seconds:g} seconds; send them at once."
        self._close_with(408, text, "header_timeout")

    def _close_with(self, status: int, text: str, code: str) -> None:
        self._stop_watch()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, text, code=code).body()).encode("ascii")
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode("ascii")),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
