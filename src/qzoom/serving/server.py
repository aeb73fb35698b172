"""A uvicorn server that drains: the first signal refuses new requests and lets the others finish, a second one stops.

While it drains it still listens, so that /ready and new requests get status 503 instead of a refused connection. Its
HTTP/1.1 protocol adds what uvicorn's lacks: a time limit for headers and a limit on connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qzoom.errors import ConfigError
from qzoom.serving.app import create_app
from qzoom.serving.errors import ApiError, too_many_connections
from qzoom.serving.middleware import only_health
from qzoom.serving.service import Service
from qzoom.serving.settings import ServerLimits

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_S = 5.0  # for the responses of requests that the drain did not wait for
_SPARE = 64  # connections beyond the limit on which probes of /health and /ready are still answered
_SPARE_S = 2.0  # for their headers
_IDLE_S = 30  # common clients drop a connection after 5 s; dropping it at the same time may lose a request


class DrainingServer(uvicorn.Server):
    """Runs one service until a signal. `announce`: called without arguments once it listens. `log_level`: "debug",
    "info", "warning" or "error"; single requests are logged from "info" down."""

    def __init__(self, service: Service, announce: Callable[[], None] | None = None, log_level: str = "info") -> None:
        limits = service.settings.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=guarded_protocol(limits),
                ws="none",
                lifespan="on",
                log_config=_log_config(log_level),
                log_level=log_level,
                server_header=False,
                proxy_headers=False,
                headers=[("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")],
                timeout_graceful_shutdown=int(_LAST_WORDS_S),
                timeout_keep_alive=_IDLE_S,
            )
        )
        self.service = service
        self.signal: int | None = None
        self._announce = announce
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `startup`; uvicorn would stop listening at the first one."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the worker, listen, then announce it."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
            for number in _SIGNALS:
                loop.add_signal_handler(number, self.stop, number)
        await super().startup(sockets)
        if self._announce is not None:
            self._announce()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Drain; when called again, stop at once. On the event loop's thread only."""
        if self._draining is None:
            self.signal = number
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.force_exit = True
            self.should_exit = True
            self._draining.cancel()

    async def _drain(self) -> None:
        try:
            if not await self.service.drain(self.service.settings.drain_s):
                await self.service.close()
                await self.service.drain(_LAST_WORDS_S)
        finally:
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then end the worker."""
        await super().shutdown(sockets)
        await self.service.close()


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address, before the model is loaded (ConfigError: it is not an address or not free)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or "not an address").lower()
        raise ConfigError(f"Cannot listen on {host}:{port} ({reason}); choose another --host or --port.") from error
    return listener


def guarded_protocol(limits: ServerLimits) -> type[H11Protocol]:
    """The protocol class for one server's limits."""
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits})


class _GuardedProtocol(H11Protocol):
    """Closes connections whose headers dawdle (408), are not HTTP (400), or are too many (503).

    A few connections beyond the limit may still ask for /health and /ready, so that a probe can tell busy from dead.
    """

    limits: ServerLimits
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        over = len(self.connections) - self.limits.connections
        if over > _SPARE:
            self._close_with(too_many_connections())
            return
        if over > 0:
            self.app = only_health(self.app)
            self._header_timer = self.loop.call_later(_SPARE_S, self._close_with, too_many_connections())
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        reason = str(sys.exception() or msg).partition(": bytearray(")[
            0
        ]  # uvicorn calls this while it handles h11's error
        text = f"The request is not valid HTTP/1.1 ({ascii(reason)[1:-1][:80]}); check the client or proxy."
        self._close_with(ApiError(400, text, code="invalid_http"))

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
        self._close_with(ApiError(408, text, code="header_timeout"))

    def _close_with(self, error: ApiError) -> None:
        """Answer here, since the application never sees the request, and close."""
        self._stop_watch()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = error.encoded()
            head = h11.Response(status_code=error.status, headers=headers)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _log_config(level: str) -> dict[str, Any]:
    """Settings for `logging.config.dictConfig`: everything goes to standard error."""
    names = ("qzoom", "uvicorn", "uvicorn.access", "uvicorn.error")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
        "loggers": {name: {"handlers": ["stderr"], "level": level.upper(), "propagate": False} for name in names},
    }
