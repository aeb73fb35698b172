"""Settings of one server: what a request may cost, how much is done at once, its name, keys and times."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated

from qzoom.errors import ConfigError
from qzoom.images.fetch import FetchPolicy
from qzoom.images.limits import ImageLimits
from qzoom.keys import check_key
from qzoom.settings import Between, settings

_MIB = 2**20
Count = Annotated[int, Between(1)]
Seconds = Annotated[float, Between(0.001, 86_400)]


@settings
class ServerLimits:
    """Limits of one server; the defaults suit one that strangers may reach."""

    body_bytes: Count = 32 * _MIB
    """Bytes of a request body."""
    messages: Count = 64
    """Chat messages per request."""
    parts: Count = 128
    """Content parts per request, all messages together."""
    text_chars: Count = 65_536
    """Characters of text per request, all messages together."""
    pictures: Count = 8
    """Pictures per request."""
    picture_bytes: Count = 16 * _MIB
    """Bytes of one encoded picture, before base64."""
    total_picture_bytes: Count = 24 * _MIB
    """Bytes of all encoded pictures of a request."""
    picture_pixels: Count = 50_000_000
    """Width x height of one picture."""
    total_pixels: Count = 100_000_000
    """Pixels of all pictures of a request."""
    pdf_pages: Annotated[int, Between(1, 10_000)] = 32
    """Pages that are read of one PDF; its pages together have at most `picture_pixels`."""
    pdf_seconds: Annotated[float, Between(0.01, 3600)] = 20.0
    """Seconds that drawing the pages of one PDF may take."""
    max_new_tokens: Count = 1024
    """Tokens of one answer."""
    visual_tokens: Count = 16_384
    """Most visual tokens that a request may ask for."""
    reading: Count = 32
    """Requests whose body is received or whose pictures are decoded at the same time; others wait."""
    connections: Count = 1024
    """Open connections; one more is answered with 503."""
    header_timeout_s: Seconds = 10.0
    """Seconds that request line and headers may take."""
    body_timeout_s: Seconds = 60.0
    """Seconds that the whole body may take, the wait for a slot included."""

    @property
    def json_values(self) -> int:
        """Most brackets, commas and colons of a body: those of its text and ample room for its structure."""
        return self.text_chars + 32 * (self.messages + self.parts) + 1024

    def image_limits(self) -> ImageLimits:
        """What the picture decoder is given."""
        return ImageLimits(
            max_pixels=self.picture_pixels,
            max_bytes=self.picture_bytes,
            max_pages=self.pdf_pages,
            max_seconds=self.pdf_seconds,
        )


@settings
class SchedulerLimits:
    """How much is done at once."""

    slots: Count = 16
    """Number of answers decoded at the same time."""
    queue: Count = 64
    """Number of requests that may wait; each holds its decoded images, about 12 MB for a page of three megapixels."""
    prefill_tokens: Count = 4096
    """Visual tokens of the coarse passes that start together; a single larger one runs alone."""
    time_slice: Count = 64
    """Tokens that an answer may take before a waiting request gets its slot."""
    cache_bytes: Annotated[int, Between(0)] = 256 * 2**20
    """Memory of the prefix cache; 0 turns it off. A server keeps decoded pictures in a quarter of it."""

    @property
    def picture_cache_bytes(self) -> int:
        """The part of `cache_bytes` in which a server keeps decoded pictures; the rest is for prefixes."""
        return self.cache_bytes // 4


@settings
class ServerSettings:
    """Settings of one server."""

    model_name: str
    """Name of the model for clients."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens the server; none leaves it open to all."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers, as https://app.example, or * for all; none by default (CORS)."""
    root_path: str = ""
    """Path under which a proxy shows the server, such as /qzoom; requests may come with or without it."""
    strict_max_tokens: bool = False
    """Refuse a max_tokens above the server's limit; otherwise the answer is cut at the limit."""
    limits: ServerLimits = field(default_factory=ServerLimits)
    """What one request may cost."""
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    """How many requests run and wait."""
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    """Which hosts pictures may be fetched from; none by default."""
    deadline_s: Seconds = 120.0
    """Time limit of a request in seconds, from the end of its body to the last byte of the answer."""
    drain_s: Annotated[float, Between(0, 86_400)] = 30.0
    """Time in seconds that running requests get to finish when the server stops."""
    heartbeat_s: Seconds = 60.0
    """Seconds without a heartbeat of the worker after which /ready says no."""

    def __post_init__(self) -> None:
        if not self.model_name.strip() or not self.model_name.isprintable():
            raise ConfigError("The served model name must be a printable text that is not empty.")
        for number, key in enumerate(self.api_keys, start=1):
            check_key(key, f"API key {number}")
        if self.root_path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.root_path):
            raise ConfigError(
                f"{ascii(self.root_path)[:80]} is not a root path; write it as /qzoom, without a last slash."
            )
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-.0-~]+", origin, re.IGNORECASE | re.ASCII):
                raise ConfigError(
                    f"{ascii(origin)[:80]} is not an origin; write scheme, host and port without a path, as "
                    "https://app.example or http://localhost:3000, or * for every origin."
                )
