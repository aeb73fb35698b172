"""What reading the pictures of a request may take: its time, places to decode in, bytes and pixels; and a cache.

All of it is used by several threads at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qzoom.engine.cache import LRUCache
from qzoom.errors import DeadlineError, StoppingError
from qzoom.images.decode import picture_size
from qzoom.images.limits import ImageLimits
from qzoom.images.load import LoadedImage, load_pictures, pixel_digest
from qzoom.images.pdf import is_pdf
from qzoom.serving.errors import ApiError, pictures_too_large
from qzoom.serving.settings import ServerLimits

_DECODERS = 4
_PIXEL_BYTES = 4  # what Pillow takes for a pixel of an RGB picture
_POLL_S = 0.1  # how soon a thread that waits for a place sees that its client has gone
_LEAST_S = 0.01  # the shortest time limit that drawing and fetching take


class ReadingTime:
    """The time in which a request must be read, and whether its client still waits. `end_s`: on the monotonic clock."""

    def __init__(self, end_s: float = math.inf) -> None:
        self.work: Future[Any] | None = None  # the thread's part of the reading that began last
        self._end_s = end_s
        self._cancelled = False

    def cancel(self) -> None:
        """End the reading at its next step: nobody waits for it."""
        self._cancelled = True

    def left_s(self) -> float:
        """Seconds that are left (DeadlineError: none; StoppingError: the reading was cancelled)."""
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise late()
        if self._cancelled:
            raise StoppingError("The request ended before its pictures were read; send it again.")
        return left

    def at_most(self, seconds: float) -> float:
        """A time limit cut to what is left; errors as in `left_s`."""
        return max(_LEAST_S, min(seconds, self.left_s()))


def late() -> DeadlineError:
    """The refusal of a request whose time is over before it is read."""
    return DeadlineError("Reading the request took all the time that a request has; send less, or try again later.")


class Places:
    """So many threads at once, first come, first served; waiting for a place ends with the request's time. `count`:
    number of places."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, reading: ReadingTime) -> Iterator[None]:
        """Have one of the places (errors as in `ReadingTime.left_s`, before the block begins)."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not (self._free and self._queue[0] is ticket):
                    self._changed.wait(min(reading.left_s(), _POLL_S))
                reading.left_s()
                self._free -= 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


class PictureTotals:
    """Counts the encoded pictures of one request; only their headers are read."""

    def __init__(self, limits: ServerLimits) -> None:
        self.pixels = 0  # those of PDFs are not known yet and count as none
        self._bytes = 0
        self._limits = limits

    def add(self, data: bytes, number: int) -> None:
        """Count the next picture.

        Args:
            number: for errors, from 1.

        Raises:
            ApiError: status 413, too many bytes or pixels together.
            ImageError: it is not a picture or is itself outside the limits.
        """
        limits = self._limits
        self._bytes += len(data)
        if self._bytes > limits.total_picture_bytes:
            raise pictures_too_large(limits.total_picture_bytes)
        if is_pdf(data):
            return
        width, height = picture_size(data, f"picture {number}", limits.image_limits())
        self.pixels += width * height
        if self.pixels > limits.total_pixels:
            most = f"{limits.total_pixels / 1e6:.4g} megapixels"
            text = f"The pictures have more pixels together than the limit of {most}; shrink them or send fewer."
            raise ApiError(413, text, param="messages", code="too_many_pixels")


def pixels_of(pictures: tuple[LoadedImage, ...]) -> int:
    """Pixels of all of them."""
    return sum(picture.size_px[0] * picture.size_px[1] for picture in pictures)


class PictureCache(LRUCache[tuple[LoadedImage, ...]]):
    """Decoded pictures of earlier requests, by API key and SHA-256 of the encoded bytes.

    A picture that comes again is neither decoded nor hashed pixel by pixel again. The limits are checked before, on the
    encoded bytes, as if there were no cache.

    Args:
        max_bytes: memory of all pictures together; 0 keeps none.
        decoders: pictures that are decoded at the same time, since each may take hundreds of megabytes. Half as many
            PDFs, which may take long, are drawn beside them.
    """

    def __init__(self, max_bytes: int, decoders: int = _DECODERS) -> None:
        super().__init__(max_bytes, lambda pictures: _PIXEL_BYTES * pixels_of(pictures))
        self.decoders = Places(decoders)
        self.drawers = Places(max(1, decoders // 2))

    def load(
        self, data: bytes, limits: ImageLimits, tenant: str, pages: str = "", *, reading: ReadingTime | None = None
    ) -> tuple[LoadedImage, ...]:
        """The picture, or the pages of a PDF, from memory or decoded.

        Args:
            data: the encoded bytes, already checked against the server's limits.
            pages: of a PDF; "" for all.
            reading: until when; None for no limit.

        Raises:
            ImageError: it cannot be decoded.
            ConfigError: pages that a PDF does not have.
            DeadlineError, StoppingError: as in `ReadingTime.left_s`.
        """
        reading = reading or ReadingTime()
        reading.left_s()
        if not self.max_bytes:
            return self._decode(data, limits, pages, reading)
        drawn = f"{pages}/{limits.max_pixels}" if is_pdf(data) else ""
        digest = hashlib.sha256(tenant.encode() + b"\0" + drawn.encode() + b"\0")
        digest.update(data)
        key = digest.digest()
        pictures = self.get(key)
        if pictures is None:
            decoded = self._decode(data, limits, pages, reading)
            pictures = tuple(dataclasses.replace(p, digest=pixel_digest(p.image)) for p in decoded)
            self.put(key, pictures)
        return pictures

    def _decode(self, data: bytes, limits: ImageLimits, pages: str, reading: ReadingTime) -> tuple[LoadedImage, ...]:
        with (self.drawers if is_pdf(data) else self.decoders).hold(reading):
            own = replace(limits, max_seconds=reading.at_most(limits.max_seconds))
            return load_pictures(data, own, pages)
