"""A real server in a thread of this process, on a free port, and requests to send to it."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from qzoom import QZoom
from qzoom.serving.engines.base import ServingEngine
from qzoom.serving.engines.native import NativeEngine
from qzoom.serving.server import DrainingServer, bind
from qzoom.serving.service import Service
from qzoom.serving.settings import ServerSettings


@dataclass(frozen=True)
class Site:
    url: str
    service: Service
    server: DrainingServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def stop(self) -> None:
        """What a SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.stop)


@contextmanager
def running(model: QZoom | ServingEngine, **settings: Any) -> Iterator[Site]:
    """Serve until the block ends; `settings` as in `ServerSettings`."""
    listener = bind("127.0.0.1", 0)
    known = ServerSettings(**({"model_name": "tiny", "drain_s": 1.0} | settings))
    service = Service(NativeEngine(model, known) if isinstance(model, QZoom) else model, known)
    loops: list[asyncio.AbstractEventLoop] = []
    up = threading.Event()

    def announce() -> None:
        loops.append(asyncio.get_running_loop())
        up.set()

    server = DrainingServer(service, announce, log_level="error")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert up.wait(60), "the server did not start"
    site = Site(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server, loops[0], thread)
    try:
        yield site
    finally:
        for _ in range(2):
            if thread.is_alive() and not site.loop.is_closed():
                site.stop()
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until it holds; a state of another thread has no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def idle(site: Site) -> bool:
    """Whether nothing runs, waits or is in flight."""
    engine = site.service.engine
    return not (engine.running or engine.waiting or site.service.in_flight)


def page(text: str = "TOTAL 3.55", size: tuple[int, int] = (320, 400)) -> Image.Image:
    """A small page with one line of print."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text((30, size[1] // 2), text, fill="black", font_size=24)
    return image


def data_url(image: Image.Image | None = None) -> str:
    file = io.BytesIO()
    (image or page()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_part(url: str | None = None, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url()} | more}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    """A user's turn of texts and pictures."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request; without messages it asks about `page()`."""
    asked = list(messages) or [user(image_part(), "What is the total amount?")]
    return {"model": "tiny", "messages": asked, "max_tokens": 8} | more
