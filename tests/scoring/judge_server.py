"""A real HTTP server that behaves as it is told: one behaviour per request, the last one from then on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script:
    """What to answer, and what was asked."""

    def __init__(self, *behaviours: object) -> None:
        self.behaviours = list(behaviours)
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.lock = threading.Lock()

    def next(self) -> object:
        with self.lock:
            return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]


@contextmanager
def serve(script: Script) -> Iterator[str]:
    """The server's address."""
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.asked.append({"path": self.path, **body})
                script.headers.append(dict(self.headers))
            what = script.next()
            if what == "hang":
                done.wait(30)
                return
            if what == "drop":
                self.close_connection = True  # without a word
                return
            if isinstance(what, tuple):
                self._send(what[0], b'{"error": "no"}', what[1] if len(what) > 1 else {})
            elif callable(what):
                self._send(200, self._completion(what(body)), {})
            elif isinstance(what, bytes):
                self._send(200, what, {})
            else:
                self._send(200, self._completion(str(what)), {})

        def _completion(self, text: str) -> bytes:
            return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        done.set()
        server.shutdown()
        server.server_close()
        thread.join()
