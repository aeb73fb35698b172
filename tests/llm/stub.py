"""A real HTTP server that answers chats as it is told and counts them by content."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], Any]


@dataclass
class Stub:
    """What to answer and what was asked.

    `answer(body, n)` gets a request and how often its content came before. It gives a text, bytes (a whole body),
    (status, headers), or "hang", "drop", "drip".
    """

    answer: Answer
    models_status: int = 200
    models: tuple[str, ...] = ()
    asked: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    now: int = 0
    most: int = 0
    usage: tuple[int, int] = (100, 10)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)

    def come(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[str, int]:
        content = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self.lock:
            before = self.asked[content]
            self.asked[content] += 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        return content, before

    def gone(self) -> None:
        with self.lock:
            self.now -= 1


def always(text: str) -> Answer:
    return lambda body, before: text


def in_turn(*answers: Any) -> Answer:
    """One answer a request, the last one from then on; a function gets the request."""
    left, lock = list(answers), threading.Lock()

    def answer(body: dict[str, Any], before: int) -> Any:
        with lock:
            what = left.pop(0) if len(left) > 1 else left[0]
        return what(body) if callable(what) else what

    return answer


def text_of(body: dict[str, Any]) -> str:
    """All texts of a request's last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            listed = {"object": "list", "data": [{"id": name} for name in stub.models]}
            self._send(stub.models_status, json.dumps(listed).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content, before = stub.come(body, {k.lower(): v for k, v in self.headers.items()})
            try:
                self._answer(content, stub.answer(body, before))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                stub.gone()

        def _answer(self, content: str, what: Any) -> None:
            if what in ("hang", "drop"):
                if what == "hang":
                    stub.done.wait(60)
                self.close_connection = True
            elif what == "drip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not stub.done.wait(0.02):
                    self.wfile.write(b"a")
            elif isinstance(what, tuple):
                self._send(what[0], what[2] if len(what) > 2 else b'{"error": {"message": "no"}}', what[1])
            elif isinstance(what, bytes):
                self._send(200, what, {})
            else:
                self._send(200, completion(what, stub.usage), {})
                with stub.lock:
                    stub.paid[content] += 1

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


@contextmanager
def serve(stub: Stub) -> Iterator[str]:
    """The API's address."""
    server = _Server(("127.0.0.1", 0), _handler(stub))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub.url
    finally:
        stub.done.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    """An address where nobody answers; its port stays taken meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1"


def completion(text: Any, usage: tuple[int, int] = (100, 10), finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps(
        {
            "model": "stub-1",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
        }
    ).encode()
