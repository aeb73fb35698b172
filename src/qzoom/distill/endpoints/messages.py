"""What is sent: texts and pictures, their form on the wire, and the digest that a kept call is found by.

A picture counts by its pixels, so that the same crop is the same call whatever file it came from and whatever version
of a library encodes it. It is encoded only when a call is really made.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qzoom.distill.endpoints.settings import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Message", "Shown", "call_key", "wire"]

KEY_SCHEMA = 1


class Shown:
    """A picture to be sent, as PNG.

    Args:
        image: RGB; left as it is.
        max_pixels: scaled down to it when larger.
    """

    def __init__(self, image: Image, max_pixels: int) -> None:
        self._image = image
        self._max_pixels = max_pixels
        self._url = ""
        self._lock = threading.Lock()
        width, height = image.size
        content = f"{width}x{height}/{min(max_pixels, width * height)}/".encode() + image.convert("RGB").tobytes()
        self.digest = hashlib.sha256(content).hexdigest()

    def url(self) -> str:
        """The picture as a data URL."""
        with self._lock:
            if not self._url:
                file = io.BytesIO()
                self._scaled().save(file, "PNG", compress_level=1)
                self._url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            return self._url

    def _scaled(self) -> Image:
        from PIL import Image

        width, height = self._image.size
        image = self._image.convert("RGB")
        if width * height <= self._max_pixels:
            return image
        share = math.sqrt(self._max_pixels / (width * height))
        size = (max(1, math.floor(width * share)), max(1, math.floor(height * share)))
        return image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message of a chat.

    Args:
        role: "system" or "user".
        parts: texts and pictures in order.
    """

    role: str
    parts: tuple[str | Shown, ...]


def wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as an endpoint takes them."""
    return [{"role": message.role, "content": _content(message.parts)} for message in messages]


def call_key(
    name: str, model: str, messages: Sequence[Message], sampling: Sampling, extra: Mapping[str, Any], sample: int
) -> str:
    """Hex digest of all that decides a reply.

    Args:
        name: of the role's member, since two members may serve different weights under one model name.
        model: name at the endpoint.
        messages: the chat.
        sampling: how replies are drawn.
        extra: further fields of the request.
        sample: number of the sample.
    """
    parts = [
        [message.role, [part if isinstance(part, str) else {"picture": part.digest} for part in message.parts]]
        for message in messages
    ]
    drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.send_seed]
    content = [KEY_SCHEMA, name, model, parts, drawn, dict(extra), sample]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _content(parts: Sequence[str | Shown]) -> Any:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": part.url()}}
        for part in parts
    ]
