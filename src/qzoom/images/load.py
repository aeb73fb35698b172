"""`load_image`: any picture source to safe 8-bit RGB, the first step of every question.

Sources (paths, bytes, file objects, data URLs, arrays, PIL pictures) are read up to the limit, checked against the
limits by their header, decoded (`decode`) and converted (`convert`). `load_pictures` also takes PDFs, whose pages are
several pictures (`pdf`). Pillow's global settings are neither changed nor relied on; calls from several threads do not
disturb each other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import PIL.Image
from PIL import Image

from qzoom.errors import ConfigError, ImageError
from qzoom.images.convert import array_of, array_to_rgb
from qzoom.images.decode import decode_bytes, finish_image
from qzoom.images.limits import ImageLimits, check_bytes, check_size, refuse
from qzoom.images.pdf import PdfPage, draw_pages, is_pdf

_CHUNK_BYTES = 1 << 20
_MAX_PATH = 255
_LONGEST_HEADER = 1000
_BASE64_HEADER = re.compile(r'data:(?:[^,"]|"[^"]*")*?; *base64 *,', re.IGNORECASE)
_ORDINARY = bytes.maketrans(b" -_", b"++/")
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "JVBERi0")  # PNG, JPEG, GIF, WebP, PDF


def shown(text: str) -> str:
    """A path as an error shows it: quoted, on one line, at most about 100 characters."""
    quoted = ascii(text) if any(0xD800 <= ord(c) <= 0xDFFF for c in text) else repr(text)
    return quoted if len(quoted) <= 100 else quoted[:40] + "..." + quoted[-57:]


def local_path(url: str) -> str:
    """The path in a `file://` URL (ImageError: it is malformed or names another machine)."""
    remedy = "write file:///path/to/picture.png"
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise refuse(shown(url), "its address is malformed", remedy) from error
    if address.netloc not in ("", "localhost"):
        raise refuse(shown(url), "it names another machine", remedy)
    return url2pathname(address.path)


def read_path(path: str | os.PathLike[str], limits: ImageLimits) -> bytes:
    """The bytes of a file; its size is checked before it is read (ImageError: missing, a folder, not permitted, empty
    or too large)."""
    name = shown(os.fspath(path))
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise refuse(name, "it is a folder", "name one picture file in it")
        if stat.S_ISREG(status.st_mode):
            check_bytes(status.st_size, name, limits)
        with Path(path).open("rb") as file:
            data = _read_at_most(file, limits.max_bytes + 1)
    except FileNotFoundError as error:
        raise refuse(name, "there is no such file", "check the path") from error
    except PermissionError as error:
        raise refuse(name, "it may not be opened (permission denied)", "check the file's permissions") from error
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "not a valid path").lower()
        raise refuse(name, f"it cannot be opened ({reason})", "check the path") from error
    check_bytes(len(data), name, limits)
    return data


def read_file_object(file: Any, limits: ImageLimits) -> tuple[bytes, str]:
    """The bytes of an open binary file from its position on, and the name for errors (ImageError: closed, opened as
    text, unreadable, empty or too large)."""
    label = getattr(file, "name", None)
    name = f"the open file {shown(label)}" if isinstance(label, str) else "the open file"
    if getattr(file, "closed", False):
        raise refuse(name, "it is closed", "open it again or pass its path")
    try:
        data = _read_at_most(file, limits.max_bytes + 1)
    except TypeError as error:
        raise refuse(name, "it does not give bytes", "open it in binary mode, open(path, 'rb')") from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError of a text file is a ValueError
        raise refuse(name, "reading from it failed", "open it again for reading in binary mode") from error
    if not data:
        raise refuse(name, "it gives no bytes", "check that it is not empty or already read to its end")
    check_bytes(len(data), name, limits)
    return data, name


def read_data_url(url: str, limits: ImageLimits) -> bytes:
    """The bytes of a `data:` URL; its length is checked before it is decoded (ImageError: without a comma, not base64,
    empty or too large)."""
    name = "the data URL"
    mark = _BASE64_HEADER.match(url, 0, _LONGEST_HEADER)
    if mark is None:
        what = "is not marked as base64" if "," in url else "has no comma before its data"
        raise refuse(name, f"it {what}", "write data:image/png;base64,<data>")
    payload = url[mark.end() :]
    check_bytes(len(payload) * 3 // 4 if len(payload) > limits.max_bytes else min(1, len(payload)), name, limits)
    try:
        encoded = unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")
        # Lines may be broken; a blank inside one is a plus sign that form encoding took away.
        encoded = b"".join(line.strip() for line in encoded.splitlines()).translate(_ORDINARY)
        data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(name, "its base64 data are broken", "encode the file again with base64.b64encode") from error
    check_bytes(len(data), name, limits)
    return data


def png_data_url(image: PIL.Image.Image) -> str:
    """A picture as a `data:` URL, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _read_at_most(file: Any, most: int) -> bytes:
    """Up to `most` bytes; raw streams may give less at a time than asked (TypeError: something other than bytes)."""
    parts: list[bytes] = []
    left = most
    while left > 0:
        part = file.read(min(left, _CHUNK_BYTES))
        if not isinstance(part, bytes | bytearray | memoryview):
            raise TypeError("not bytes")
        if not part:
            break
        parts.append(bytes(part[:left]))
        left -= len(parts[-1])
    return b"".join(parts)


_PIL_LOCK = threading.Lock()  # a lazily opened picture must not be decoded by two threads at once


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A picture as the engine takes it."""

    image: PIL.Image.Image  # RGB, EXIF rotation applied, transparency on white, without metadata
    size_px: tuple[int, int]  # (width, height); "original pixels" are those of `image`
    # the file's format ("JPEG", "PNG", "WebP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "PDF"); None for arrays and new
    # PIL images
    format: str | None = None
    notes: tuple[str, ...] = ()  # what the reader should know, e.g. "first of 3 pages".
    # `pixel_digest` of the picture where it is known, so that nobody computes it again; else b""
    digest: bytes = field(default=b"", repr=False, compare=False)
    page: PdfPage | None = None  # for a page of a PDF, which one of what


def load_image(source: Any, limits: ImageLimits | None = None) -> LoadedImage:
    """Read one picture.

    Args:
        source: a path (str or Path), a web address (fetched from public hosts only), a `file://` or
            `data:...;base64,` URL, the file's bytes, an open binary file (read from its position on), a numpy array
            or torch tensor (height x width, or with 1, 3 or 4 channels last or first, which for a tensor is the rule;
            bool, uint8, uint16 or floats from 0 to 1), a PIL image,
            `{"bytes": ..., "path": ...}` as in `datasets`, an OpenAI `{"type": "image_url", ...}` or transformers
            `{"type": "image", ...}` part, or a `LoadedImage`.

    Returns:
        The first page or frame as RGB; for all pages of a PDF see `load_pictures`.

    Raises:
        ImageError: one sentence that says what is wrong with which source and what to do.
    """
    return _load(source, limits or ImageLimits(), "1")[0]


def load_pictures(source: Any, limits: ImageLimits | None = None, pages: str = "") -> tuple[LoadedImage, ...]:
    """Read one picture, or the pages of a PDF.

    Args:
        source: as in `load_image`, or a list of such sources.
        limits: as in `load_image`; the pages of one PDF have at most `max_pixels` together.
        pages: pages of the PDF, such as "1-5,9"; "" for all.

    Raises:
        ImageError: one sentence that says what is wrong with which source and what to do.
        ConfigError: pages that the PDF does not have, or pages without any PDF.
    """
    sources = source if isinstance(source, list | tuple) else [source]
    return tuple(picture for group in load_groups(sources, limits, pages) for picture in group)


def load_groups(
    sources: Sequence[Any], limits: ImageLimits | None = None, pages: str = ""
) -> list[tuple[LoadedImage, ...]]:
    """The pictures of every source, in order; see `load_pictures`."""
    if not isinstance(pages, str):
        raise ConfigError(f"pages must be a text such as '1-5,9', not {pages!r}.")
    groups = [_load(source, limits or ImageLimits(), pages) for source in sources]
    if pages and not any(picture.page for group in groups for picture in group):
        raise ConfigError(f"Pages {pages!r} can be chosen of a PDF only, but there is none; leave them out.")
    return groups


def pixel_digest(image: PIL.Image.Image) -> bytes:
    """SHA-256 of the pixels alone: pictures of other sizes or modes may share it."""
    return hashlib.sha256(image.tobytes()).digest()


def picture_digest(image: PIL.Image.Image) -> str:
    """Twenty hex digits of a hash over the size and the pixels of an RGB picture: its name in stored data."""
    pixels = np.ascontiguousarray(image if image.mode == "RGB" else image.convert("RGB"))
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(pixels.data)
    return digest.hexdigest()[:20]


def _load(source: Any, limits: ImageLimits, pages: str) -> tuple[LoadedImage, ...]:
    if isinstance(source, LoadedImage):
        return (source,)
    try:
        if isinstance(source, dict):
            return _load(_source_in(source), limits, pages)
        if isinstance(source, Image.Image):
            return (_from_pil(source, limits),)
        if (array := array_of(source)) is not None:
            rgb, note = array_to_rgb(array, "the array", limits)
            return (LoadedImage(rgb, rgb.size, None, (note,) if note else ()),)
        data, name = _read(source, limits)
        if is_pdf(data):
            drawn = draw_pages(data, name, limits, pages)
            return tuple(LoadedImage(image, image.size, "PDF", notes, page=page) for image, page, notes in drawn)
        rgb, format_name, notes = decode_bytes(data, name, limits)
    except MemoryError as error:
        raise ImageError("Cannot read the picture: there is not enough memory for it; shrink it.") from error
    return (LoadedImage(rgb, rgb.size, format_name, notes),)


def _read(source: Any, limits: ImageLimits) -> tuple[bytes, str]:
    """The encoded bytes of a source and its name for errors."""
    if isinstance(source, str):
        return _read_text(source, limits)
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
        "it is not a path, address, bytes, binary file, numpy array, tensor or PIL image",
        "pass one of these",
    )


def _read_text(text: str, limits: ImageLimits) -> tuple[bytes, str]:
    """The bytes behind a path or an address, and its name for errors."""
    if text[:1].isspace() and text.lstrip()[:5].lower() == "data:":
        text = text.lstrip()
    scheme = text[:8].lower()
    if scheme.startswith("data:"):
        return read_data_url(text, limits), "the data URL"
    if scheme.startswith(("http://", "https://")):
        from qzoom.images.fetch import FetchPolicy, fetch_image

        policy = FetchPolicy(any_host=True, allow_http=True, max_bytes=limits.max_bytes)
        return fetch_image(text, policy), shown(text)
    if scheme.startswith("file://"):
        text = local_path(text)
    if not text:
        raise refuse("the picture", "its path is empty", "name a picture file")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise refuse(
            shown(text), "addresses of this kind are not read", "download it, or give an http or https address"
        )
    long = len(text) > _MAX_PATH or (text.startswith(_BASE64_STARTS) and not os.path.exists(text))
    if long and re.fullmatch(r"[A-Za-z0-9+/=_\s-]+", text):
        raise refuse(
            "the picture", "it looks like base64, which is not marked as such", "write data:image/png;base64,<data>"
        )
    return read_path(text, limits), shown(text)


def _source_in(part: dict[Any, Any]) -> Any:
    """The source in a mapping: `datasets`' bytes or path, or what an OpenAI or transformers part holds."""
    address = part.get("image_url")
    candidates = (part.get("bytes"), part.get("path"), part.get("image"), part.get("url"), address)
    source = next((value for value in candidates if value is not None), None)
    if isinstance(source, dict):
        source = source.get("url")
    if source is None and isinstance(part.get("base64"), str):
        encoded = part["base64"]
        source = encoded if encoded[:5].lower() == "data:" else f"data:;base64,{encoded}"
    empty = source is None or (isinstance(source, str | bytes | bytearray) and not source)
    if not empty and not isinstance(source, dict | list | tuple | bool | int | float):
        return source
    raise refuse(
        "a picture from a mapping",
        "it has no bytes, path, image or image_url",
        'pass {"bytes": ...}, {"path": ...}, {"image": ...} or {"type": "image_url", "image_url": {"url": ...}}',
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
