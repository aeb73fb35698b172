"""A web server on the loopback that misbehaves on request, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Answer = Callable[[socket.socket], None]


@dataclass
class Assets:
    """A running server; `answers` maps request paths to what is written to the connection."""

    port: int
    answers: dict[str, Answer]
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)


def reply(status: str, body: bytes = b"", **headers: str) -> Answer:
    """A complete answer; header names are written with underscores."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Content_Length" not in headers and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")
    return lambda connection: connection.sendall(head + body)


@contextlib.contextmanager
def assets(
    answers: dict[str, Answer], wrap: Callable[[socket.socket], socket.socket] | None = None
) -> Iterator[Assets]:
    """Serve until the block ends; `wrap` may put TLS around a connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Assets(listener.getsockname()[1], answers)
    threads = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            inner = wrap(connection) if wrap else connection
            with inner:
                lines = _head(inner)
                path = lines[0].split(" ")[1]
                server.asked.append((path, dict(line.split(": ", 1) for line in lines[1:])))
                server.answers[path](inner)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
                threads[-1].start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield server
    finally:
        server.stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [accepting, *threads]:
            thread.join(10)


def _head(connection: socket.socket) -> list[str]:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(4096)
        if not part:
            raise ConnectionError
        data += part
    return data.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
