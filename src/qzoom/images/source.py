"""Sources to bytes, never more than the limit allows: paths, file objects and data URLs."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from qzoom.images.limits import ImageLimits, check_bytes, refuse

__all__ = ["read_data_url", "read_file_object", "read_path", "shown"]

_CHUNK_BYTES = 1 << 20


def shown(text: str) -> str:
    """A path as an error shows it: quoted, on one line, at most about 100 characters."""
    quoted = ascii(text) if any(0xD800 <= ord(c) <= 0xDFFF for c in text) else repr(text)
    return quoted if len(quoted) <= 100 else quoted[:40] + "..." + quoted[-57:]


def read_path(path: str | os.PathLike[str], limits: ImageLimits) -> bytes:
    """The bytes of a file; its size is checked before it is read.

    Raises:
        ImageError: missing, a folder, not permitted, empty or too large.
    """
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
    """The bytes of an open binary file from its position on, and the name for errors.

    Raises:
        ImageError: closed, opened as text, unreadable, empty or too large.
    """
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
    """The bytes of a `data:` URL; its length is checked before it is decoded.

    Raises:
        ImageError: without a comma, not base64, empty or too large.
    """
    name = "the data URL"
    header, comma, payload = url.partition(",")
    if not comma:
        raise refuse(name, "it has no comma before its data", "write data:image/png;base64,<data>")
    if not header.lower().endswith(";base64"):
        raise refuse(name, "it is not marked as base64", "write data:image/png;base64,<data>")
    check_bytes(len(payload) * 3 // 4 if len(payload) > limits.max_bytes else min(1, len(payload)), name, limits)
    try:
        encoded = b"".join((unquote_to_bytes(payload) if "%" in payload else payload.encode("ascii")).split())
        data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(name, "its base64 data are broken", "encode the file again with base64.b64encode") from error
    check_bytes(len(data), name, limits)
    return data


def _read_at_most(file: Any, most: int) -> bytes:
    """Up to `most` bytes; raw streams may give less at a time than asked.

    Raises:
        TypeError: the stream gives something other than bytes.
    """
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
