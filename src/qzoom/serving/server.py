"""A uvicorn server that drains: the first signal lets admitted requests finish and refuses new ones, a second stops.

While it drains it still listens, so that /ready and new requests are told 503 instead of meeting a closed door.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from qzoom.errors import ConfigError
from qzoom.serving.app import create_app
from qzoom.serving.connections import guarded_protocol
from qzoom.serving.log import log_config
from qzoom.serving.service import Service

__all__ = ["DrainingServer", "bind"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_S = 5.0
_IDLE_S = 30  # common clients drop a connection after 5 s; dropping it at the same time may lose a request


class DrainingServer(uvicorn.Server):
    """Runs one service until a signal.

    Args:
        service: not started yet.
        announce: called once it listens, with nothing.
        log_level: see `log.log_config`.
    """

    def __init__(self, service: Service, announce: Callable[[], None] | None = None, log_level: str = "info") -> None:
        limits = service.settings.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=guarded_protocol(limits),
                ws="none",
                lifespan="on",
                log_config=log_config(log_level),
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
        """Signals are ours, not uvicorn's, which would close the door at the first one."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the worker, listen, then say so."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
            for number in _SIGNALS:
                loop.add_signal_handler(number, self.stop, number)
        await super().startup(sockets)
        if self._announce is not None:
            self._announce()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Drain; when called again, stop at once. On the event loop's thread only.

        Args:
            number: the signal that asked for it.
        """
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
        """Close the door, then end the worker, in a hurry too."""
        await super().shutdown(sockets)
        await self.service.close()


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address, before the model is loaded.

    Args:
        host: a name or address.
        port: 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or "not an address").lower()
        raise ConfigError(f"Cannot listen on {host}:{port} ({reason}); choose another --host or --port.") from error
    return found
