"""Decoded pictures of earlier requests: a file that comes again is neither unpacked nor hashed pixel by pixel again.

Whoever asks has sent the bytes and had them checked against the limits, as if there were no cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading

from qzoom.engine.lru import LRUCache
from qzoom.images.limits import ImageLimits
from qzoom.images.load import LoadedImage, load_image, pixel_digest

__all__ = ["PictureCache"]

_DECODERS = 4
_PIXEL_BYTES = 4  # what Pillow takes for a pixel of an RGB picture


class PictureCache(LRUCache[LoadedImage]):
    """The most recently used pictures, by API key and SHA-256 of the encoded bytes. Safe to use from several threads.

    Args:
        max_bytes: memory of all pictures together; 0 keeps none.
        decoders: pictures that are unpacked at the same time, since each may take hundreds of megabytes.
    """

    def __init__(self, max_bytes: int, decoders: int = _DECODERS) -> None:
        super().__init__(max_bytes, lambda picture: picture.size_px[0] * picture.size_px[1] * _PIXEL_BYTES)
        self._decoders = threading.BoundedSemaphore(decoders)

    def load(self, data: bytes, limits: ImageLimits, tenant: str) -> LoadedImage:
        """The picture, from memory or decoded.

        Args:
            data: the encoded bytes, already checked against the server's limits.
            limits: for the decoder.
            tenant: pictures are shared within a tenant only.

        Raises:
            ImageError: it cannot be decoded.
        """
        if not self.max_bytes:
            return self._decode(data, limits)
        digest = hashlib.sha256(tenant.encode() + b"\0")
        digest.update(data)
        key = digest.digest()
        found = self.get(key)
        if found is None:
            found = self._decode(data, limits)
            found = dataclasses.replace(found, digest=pixel_digest(found.image))
            self.put(key, found)
        return found

    def _decode(self, data: bytes, limits: ImageLimits) -> LoadedImage:
        with self._decoders:
            return load_image(data, limits)
