"""`load_image`: any picture source to safe 8-bit RGB (the first step of every question).

Sources are read (`source`), checked against the limits by their header, decoded (`decode`) and converted (`convert`).
Pillow's global settings are neither changed nor relied on; calls from several threads do not disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.convert import array_to_rgb
from qzoom.images.decode import decode_bytes, finish_image
from qzoom.images.limits import ImageLimits, check_bytes, check_size, refuse
from qzoom.images.source import read_data_url, read_file_object, read_path, shown

__all__ = ["ImageLimits", "LoadedImage", "load_image", "pixel_digest"]

_PIL_LOCK = threading.Lock()  # a lazily opened picture must not be decoded by two threads at once


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A picture as the engine takes it.

    Args:
        image: RGB, EXIF rotation applied, transparency on white, without metadata.
        size_px: (width, height); "original pixels" are those of `image`.
        format: the file's format ("JPEG", "PNG", "WebP", "TIFF", "GIF", "BMP"); None for arrays and new PIL images.
        notes: what the reader should know, e.g. "first of 3 pages".
        digest: `pixel_digest` of the picture where it is known, so that nobody computes it again; else b"".
    """

    image: PIL.Image.Image
    size_px: tuple[int, int]
    format: str | None = None
    notes: tuple[str, ...] = ()
    digest: bytes = field(default=b"", repr=False, compare=False)


def load_image(source: Any, limits: ImageLimits | None = None) -> LoadedImage:
    """Read one picture.

    Args:
        source: a path (str or Path), the file's bytes, an open binary file (read from its position on), a
            `data:...;base64,` URL, a numpy array (height x width, or with 1, 3 or 4 channels last; bool, uint8, uint16
            or floats from 0 to 1), a PIL image, or a `LoadedImage`.
        limits: checked before decoding; None for the defaults.

    Returns:
        The first page or frame as RGB.

    Raises:
        ImageError: one sentence that says what is wrong with which source and what to do.
    """
    limits = limits or ImageLimits()
    if isinstance(source, LoadedImage):
        return source
    try:
        return _load(source, limits)
    except MemoryError as error:
        raise ImageError("Cannot read the picture: there is not enough memory for it; shrink it.") from error


def pixel_digest(image: PIL.Image.Image) -> bytes:
    """SHA-256 of the pixels alone: pictures of other sizes or modes may share it."""
    return hashlib.sha256(image.tobytes()).digest()


def _load(source: Any, limits: ImageLimits) -> LoadedImage:
    if isinstance(source, Image.Image):
        return _from_pil(source, limits)
    if isinstance(source, np.ndarray):
        rgb, note = array_to_rgb(source, "the array", limits)
        return LoadedImage(rgb, rgb.size, None, (note,) if note else ())
    data, name = _read(source, limits)
    rgb, format_name, notes = decode_bytes(data, name, limits)
    return LoadedImage(rgb, rgb.size, format_name, notes)


def _read(source: Any, limits: ImageLimits) -> tuple[bytes, str]:
    """The encoded bytes of a source and its name for errors."""
    if isinstance(source, str):
        lowered = source[:8].lower()
        if lowered.startswith("data:"):
            return read_data_url(source, limits), "the data URL"
        if lowered.startswith(("http://", "https://")):
            raise refuse(shown(source), "web addresses are not read yet", "download the picture and pass its path")
        if not source:
            raise refuse("the picture", "its path is empty", "name a picture file")
        return read_path(source, limits), shown(source)
    if isinstance(source, os.PathLike):
        path = os.fspath(source)
        path = os.fsdecode(path) if isinstance(path, bytes) else path
        return read_path(path, limits), shown(path)
    if isinstance(source, bytes | bytearray | memoryview):
        check_bytes(memoryview(source).nbytes, "the picture bytes", limits)
        return bytes(source), "the picture bytes"
    if callable(getattr(source, "read", None)):
        return read_file_object(source, limits)
    raise refuse(
        f"a picture from {type(source).__name__!r}",
        "it is not a path, bytes, binary file, data URL, numpy array or PIL image",
        "pass one of these",
    )


def _from_pil(image: PIL.Image.Image, limits: ImageLimits) -> LoadedImage:
    """A copy of the caller's picture; one that was opened but not yet decoded is decoded here."""
    filename = getattr(image, "filename", "")
    name = f"the PIL image {shown(filename)}" if isinstance(filename, str) and filename else "the PIL image"
    check_size(image.size, name, limits)
    with _PIL_LOCK:
        try:
            image.load()
        except Exception as error:  # closed file, cut off, decoder at a loss
            remedy = "open it again, or check the file it came from"
            raise refuse(name, "its pixels cannot be decoded (closed, damaged or cut off)", remedy) from error
        rgb, notes = finish_image(image, name)
    return LoadedImage(rgb, rgb.size, "WebP" if image.format == "WEBP" else image.format, notes)
