"""Files that decoders refuse although their pixels are intact, and the names of kinds that cannot be read here.

A check sum in a text chunk, packed text of many megabytes, or a missing end marker say nothing about the pixels. Such
files are read without the part in question, and a note says so. Damage to the pixels themselves stays an error.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import PIL.Image
from PIL import ImageChops

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_COLOUR_CHUNKS = (b"iCCP", b"gAMA", b"sRGB", b"cHRM", b"cICP", b"sBIT", b"eXIf", b"bKGD", b"acTL", b"fcTL", b"fdAT")
_TIFF_COMPRESSIONS = {
    34887: "LERC compression",
    34712: "JPEG 2000 compression",
    33003: "JPEG 2000 compression",
    33005: "JPEG 2000 compression",
    34661: "JBIG compression",
    34676: "SGI Log compression",
    34677: "SGI Log compression",
    34925: "LZMA compression",
    50000: "Zstandard compression",
    50001: "WebP compression",
    50002: "JPEG XL compression",
}
_JPEG_FRAMES = {
    0xC3: "a lossless JPEG",
    0xC5: "a hierarchical JPEG",
    0xC6: "a hierarchical JPEG",
    0xC7: "a lossless JPEG",
    0xC9: "a JPEG with arithmetic coding",
    0xCA: "a JPEG with arithmetic coding",
    0xCB: "a lossless JPEG",
    0xF7: "a JPEG-LS picture",
}


def readable_png(data: bytes) -> bytes | None:
    """A PNG file without damaged or too large metadata; None if its pixels are damaged, nothing is left out, or it is
    no PNG."""
    if not data.startswith(b"\x89PNG"):
        return None
    parts, left_out, at = [data[:8]], False, 8
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if end > len(data):
            return None
        intact = zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if kind in _PIXEL_CHUNKS and not intact:
            return None
        if kind in _PIXEL_CHUNKS or (kind in _COLOUR_CHUNKS and intact):
            parts.append(data[at:end])
        else:
            left_out = True
        if kind == b"IEND":
            break
        at = end
    return b"".join(parts) if left_out else None


def jpeg_fillers(data: bytes) -> tuple[bytes, bytes] | None:
    """A JPEG file without an end marker, closed in two ways; None if it has one.

    If all its pixels are there, a decoder gives the same picture for both, since it reads nothing of what was added.
    If pixels are missing, the first way leaves them grey and the second fills them with noise.
    """
    body = data.rstrip(b"\0")
    if body.endswith(b"\xff\xd9") or not data.startswith(b"\xff\xd8"):
        return None
    noise = np.random.default_rng(0).integers(1, 0xFE, 4096).astype(np.uint8).tobytes()
    return data + b"\xff\xd9", data + noise + b"\xff\xd9"


def same_pixels(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    """Whether two decoded pictures are equal."""
    if first.mode != second.mode or first.size != second.size:
        return False
    pairs = zip(first.split(), second.split(), strict=True)
    return all(ImageChops.difference(*pair).getbbox() is None for pair in pairs)


def unsupported_kind(data: bytes) -> str:
    """What makes an intact file unreadable for the decoders here ("a lossless JPEG"); "" for what they should read."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_kind(data)
        if data[:2] == b"BM":
            method = struct.unpack_from("<I", data, 30)[0]
            return {4: "a BMP with a JPEG inside", 5: "a BMP with a PNG inside"}.get(method, "")
        if data[:2] in (b"II", b"MM"):
            return _tiff_kind(data)
    except (struct.error, IndexError):
        pass
    return ""


def _jpeg_kind(data: bytes) -> str:
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            if marker in _JPEG_FRAMES:
                return _JPEG_FRAMES[marker]
            return f"a JPEG with {data[at + 4]} bits a channel" if data[at + 4] != 8 else ""
        if marker == 0xDA:
            break
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return ""


def _tiff_kind(data: bytes) -> str:
    """Compression, or bits and sample format, of the first directory of a classic TIFF."""
    order = "<" if data[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", data, 2)[0] != 42:
        return "a BigTIFF of this kind"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    tags: dict[int, int] = {}
    for i in range(min(count, 200)):
        tag, kind, number = struct.unpack_from(order + "HHI", data, start + 2 + 12 * i)
        at = start + 10 + 12 * i
        if kind == 3 and number > 2:
            (at,) = struct.unpack_from(order + "I", data, at)
        if kind in (3, 4):
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at)
    compression = tags.get(259, 1)
    if compression in _TIFF_COMPRESSIONS:
        return f"a TIFF with {_TIFF_COMPRESSIONS[compression]}"
    bits, samples, form, photometric = tags.get(258, 1), tags.get(277, 1), tags.get(339, 1), tags.get(262, 1)
    number = {1: "whole", 2: "signed whole", 3: "floating-point", 4: "undefined", 5: "complex", 6: "complex"}
    known = bits in (1, 2, 4, 8) or (bits == 16 and form in (1, 2)) or (bits == 32 and form in (1, 2, 3))
    if not known or samples > 4 or photometric not in (0, 1, 2, 3, 5, 6, 8):
        return f"a TIFF with {samples} x {bits}-bit {number.get(form, 'other')} numbers a pixel"
    if bits == 16 and photometric == 0 and order == ">":
        return "a big-endian 16-bit TIFF whose zero is white"
    return ""
