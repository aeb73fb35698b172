"""What a table holds where a picture is expected: bytes, a path, base64, or the mapping that `datasets` stores."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from qzoom.errors import DataError

__all__ = ["picture_source"]

_LONGEST_PATH = 1024


def picture_source(value: Any, column: str, folder: Path | None) -> bytes | Path:
    """The encoded picture, or the path of its file.

    Args:
        value: a table's cell.
        column: its name, for the error text.
        folder: relative paths start here and may not leave it; None where only the hub's own cache is read.

    Raises:
        DataError: nothing that could be a picture, or a path that leaves the folder.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f"the column {column!r} holds no picture: expected bytes, a path or base64, not {value!r:.40}.")
    if value.startswith("data:"):
        return _decoded(value.partition(",")[2], column)
    if len(value) <= _LONGEST_PATH and "\0" not in value:
        path = Path(value)
        if folder is None:
            if path.is_file():
                return path
        elif path.is_absolute() or ".." in path.parts:
            raise DataError(f"the picture {value!r:.80} must be a path inside the data folder.")
        elif (folder / path).is_file():
            return folder / path
        elif path.suffix:
            raise DataError(f"the picture {value!r:.80} is not in {folder}.")
    return _decoded(value, column)


def _decoded(value: str, column: str) -> bytes:
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise DataError(f"the column {column!r} is neither the path of a picture nor base64: {value!r:.40}.")
    return data
