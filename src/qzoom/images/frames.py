"""How many pages or frames a file holds, counted on its bytes without decoding, in bounded time."""

from __future__ import annotations

import struct

__all__ = ["frame_note"]

_MAX_STEPS = 1_000_000  # blocks walked in a GIF, about 0.3 s at worst
_MAX_PAGES = 10_000


def frame_note(data: bytes, format_name: str, decoder_frames: int) -> str:
    """A note such as "first of 3 pages", or an empty text for a file that holds one picture.

    Args:
        data: the encoded file.
        format_name: its format, e.g. "TIFF".
        decoder_frames: frames that the decoder knows of without seeking (PNG, WebP); 1 otherwise.
    """
    count, complete = decoder_frames, True
    try:
        if format_name == "GIF":
            count, complete = _gif_frames(data)
        elif format_name == "TIFF":
            count, complete = _tiff_pages(data)
    except (IndexError, struct.error):
        pass  # cut off behind the first picture: what was counted before does not matter
    if count <= 1:
        return ""
    kind = "pages" if format_name == "TIFF" else "frames"
    return f"first of {'' if complete else 'more than '}{count} {kind}"


def _gif_frames(data: bytes) -> tuple[int, bool]:
    """Image descriptors in a GIF's chain of blocks."""
    at = 13 + _colour_table(data[10])
    frames = 0
    for _ in range(_MAX_STEPS):
        if at >= len(data):
            return frames, True
        kind = data[at]
        if kind == 0x3B:  # trailer
            return frames, True
        if kind == 0x2C:  # image descriptor, local colours, code size
            frames += 1
            at += 10 + _colour_table(data[at + 9]) + 1
        elif kind == 0x21:  # extension and its label
            at += 2
        else:
            at += 1  # junk between blocks
            continue
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
        if frames >= _MAX_PAGES:
            return frames, False
    return frames, False


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _tiff_pages(data: bytes) -> tuple[int, bool]:
    """Directories in a TIFF's or BigTIFF's chain."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    offset_code, count_code, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    (at,) = struct.unpack_from(order + offset_code, data, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen and at < len(data):
        if len(seen) >= _MAX_PAGES:
            return len(seen), False
        (entries,) = struct.unpack_from(order + count_code, data, at)
        seen.add(at)
        at += struct.calcsize("<" + count_code) + entries * entry
        if at + struct.calcsize("<" + offset_code) > len(data):
            break
        (at,) = struct.unpack_from(order + offset_code, data, at)
    return len(seen), True
