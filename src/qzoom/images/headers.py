"""What a file says about its own parts, read from the bytes before a decoder sees them.

Decoders walk through segments, chunks and tags in Python and trust the sizes of tiles. Files with far more parts than
ordinary ones, or with tiles far larger than the picture, are refused here, in bounded time.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qzoom.images.limits import ImageLimits, refuse

_SCANS = 64
_SEGMENTS = 2000  # of a JPEG
_STRAY_BYTES = 1 << 16  # between the segments before its first scan
_CHUNKS = 1 << 16  # of a PNG
_TAGS = 4096  # of a TIFF's directory
_PIECES = 1 << 16  # strips or tiles
_VALUES = 3 << 16  # of another tag, as many as the largest colour map has
_TILE_STEP = 2048
"""Sides of tiles may be as long as the picture's, rounded up to a multiple of this."""

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside a scan: neither a stuffed byte, a restart nor padding
_SCAN, _START, _END = 0xDA, 0xD8, 0xD9
_BARE = (0x01, 0xC8, _START, _END, *range(0xF0, 0xFE))  # markers without a length

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323
_START_TAGS, _LENGTH_TAGS = (273, 324), (279, 325)  # of strips and tiles
_PIECE_TAGS = _START_TAGS + _LENGTH_TAGS
_SHARED_BYTES = 1 << 26
"""Strips and tiles may overlap, as equal ones in some files do, if all of them together have no more bytes."""
_PRIVATE = 1 << 15  # tags from here on are not unpacked
_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}


def check_headers(data: bytes, name: str, limits: ImageLimits) -> None:
    """Refuse a JPEG, PNG or TIFF file whose parts are too many or too large (ImageError)."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, name)
    elif data.startswith(b"\x89PNG"):
        _check_png(data, name)
    elif data.startswith((b"II", b"MM")):
        _check_tiff(data, name, limits)


def _check_jpeg(data: bytes, name: str) -> None:
    """Thumbnails, which lie inside segments, and what follows the picture's end are not counted."""
    scans = segments = stray = 0
    at, remedy = 2, "save it again as an ordinary JPEG"
    while True:
        found = _MARKER.search(data, at)
        if scans == 0:
            stray += (found.start() if found else len(data)) - at
        if stray > _STRAY_BYTES:
            raise refuse(name, f"it has more than {_STRAY_BYTES} stray bytes before its pixels", remedy)
        if found is None:
            return
        marker, start = data[found.end() - 1], found.end()
        if marker == _END and scans > 0:
            return
        scans += marker == _SCAN
        segments += 1
        if scans > _SCANS:
            raise refuse(name, f"it has more than {_SCANS} scans", remedy)
        if segments > _SEGMENTS:
            raise refuse(name, f"it has more than {_SEGMENTS} segments", remedy)
        at = start if marker in _BARE else start + max(2, int.from_bytes(data[start : start + 2], "big"))


def _check_png(data: bytes, name: str) -> None:
    at = 8
    for _ in range(_CHUNKS):
        if at + 12 > len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    if at + 12 <= len(data):
        raise refuse(name, f"it has more than {_CHUNKS} chunks", "save it again as an ordinary PNG")


@dataclass(frozen=True)
class _Tag:
    number: int
    count: int
    """Values that it has."""
    unit: int
    """Bytes of one value; 0 if the kind is unknown."""
    at: int
    """Where its values begin."""
    dtype: str
    """The numpy type of whole numbers; empty for other kinds."""
    apart: bool
    """Whether the values lie outside of the directory."""

    def values(self, data: bytes, most: int) -> np.ndarray[Any, Any]:
        """Its first whole numbers, as many as the file holds."""
        count = min(self.count, most, max(0, len(data) - self.at) // max(1, self.unit))
        return np.frombuffer(data, self.dtype, count, self.at) if self.dtype and count > 0 else np.empty(0)


def _check_tiff(data: bytes, name: str, limits: ImageLimits) -> None:
    """Only the first directory is checked, since only its picture is decoded."""
    remedy = "save it again as an ordinary TIFF, or as PNG"
    if data.startswith(b"MM\0+"):  # Pillow takes it for an ordinary TIFF
        raise refuse(name, "it is a big-endian BigTIFF, which cannot be read here", remedy)
    tags: dict[int, _Tag] = {}
    tile = {_TILE_WIDTH: 0, _TILE_HEIGHT: 0}
    held = 0
    for position, tag in enumerate(_tiff_tags(data)):
        held += max(0, min(tag.unit * tag.count, len(data) - tag.at)) if tag.apart else 0
        if position >= _TAGS:
            raise refuse(name, f"it has more than {_TAGS} tags", remedy)
        if tag.number in _PIECE_TAGS and tag.count > _PIECES:
            raise refuse(name, f"it has more than {_PIECES} strips or tiles", remedy)
        if tag.number < _PRIVATE and tag.unit > 1 and tag.count > _VALUES:
            raise refuse(name, f"its tag {tag.number} has more than {_VALUES} values", remedy)
        if held > 2 * len(data):
            raise refuse(name, "its tags are together larger than the file", remedy)
        if tag.number in tile:  # of a tag that comes twice, decoders may take either
            tile[tag.number] = max(tile[tag.number], *map(int, tag.values(data, 1)), 0)
        tags.setdefault(tag.number, tag)
    if _packed_bytes(data, tags) > max(2 * len(data), _SHARED_BYTES):
        raise refuse(name, "its strips or tiles overlap", remedy)
    sides = [int(side) for tag in (_WIDTH, _HEIGHT) if tag in tags for side in tags[tag].values(data, 1)]
    if len(sides) == 2:
        _check_tiles((sides[0], sides[1]), (tile[_TILE_WIDTH], tile[_TILE_HEIGHT]), name, limits)


def _packed_bytes(data: bytes, tags: dict[int, _Tag]) -> float:
    """Bytes of all strips or tiles that lie in the file; those of parts that overlap count several times."""
    most = 0.0
    for starts, lengths in itertools.product(_START_TAGS, _LENGTH_TAGS):
        if starts in tags and lengths in tags:
            at, length = (tags[tag].values(data, _PIECES).astype(np.float64) for tag in (starts, lengths))
            count = min(len(at), len(length))
            most = max(most, float(np.minimum(length[:count], len(data) - at[:count]).clip(0).sum()))
    return most


def _check_tiles(size_px: tuple[int, int], tile_px: tuple[int, int], name: str, limits: ImageLimits) -> None:
    longest = [-(-side // _TILE_STEP) * _TILE_STEP for side in size_px]
    most = max(limits.max_pixels, _TILE_STEP**2)
    if tile_px[0] > longest[0] or tile_px[1] > longest[1] or tile_px[0] * tile_px[1] > most:
        shape = f"{tile_px[0]} x {tile_px[1]} px"
        what = f"its tiles of {shape} are too large for a picture of {size_px[0]} x {size_px[1]} px"
        raise refuse(name, what, "save it again with smaller tiles, or as PNG")


def _tiff_tags(data: bytes) -> Iterator[_Tag]:
    """The tags of a TIFF's or BigTIFF's first directory, up to where the file ends."""
    order = "<" if data[:2] == b"II" else ">"
    head, entry, offset, space = ("Q", "HHQ", "Q", 8) if data[2:4] == b"+\0" else ("H", "HHI", "I", 4)
    try:
        (start,) = struct.unpack_from(order + offset, data, space)
        (number,) = struct.unpack_from(order + head, data, start)
        start += struct.calcsize("<" + head)
        for at in range(start, start + number * (4 + 2 * space), 4 + 2 * space):
            tag, kind, count = struct.unpack_from(order + entry, data, at)
            unit, place = _UNITS.get(kind, 0), at + 4 + space
            apart = unit * count > space
            if apart:
                (place,) = struct.unpack_from(order + offset, data, place)
            yield _Tag(tag, count, unit, place, order + _WHOLE[kind] if kind in _WHOLE else "", apart)
    except (struct.error, OverflowError):
        return
