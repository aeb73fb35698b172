"""Pictures as numbers, a few rows at a time, and numbers of more than 8 bits to 8 bits.

A whole picture as floats takes many times the memory of its pixels, and a file of a few kilobytes can unpack to tens of
megapixels. So every change that needs numbers is made on bands of rows of about 65,000 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
from PIL import Image

from qzoom.images.limits import refuse

Rows = np.ndarray[Any, Any]
Read = Callable[[int, int], Rows]
"""The rows of a picture from `top` up to `bottom`, as numbers."""
Change = Callable[[Rows], Rows]

_BAND_PIXELS = 1 << 16
_VALUES = 1 << 16  # of a 16-bit number
_QUANTILE = 0.999


def _bands(size_px: tuple[int, int]) -> Iterator[tuple[int, int]]:
    width, height = size_px
    rows = max(1, _BAND_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def picture_rows(image: PIL.Image.Image) -> Read:
    """Reads a decoded picture."""
    return lambda top, bottom: np.asarray(image.crop((0, top, image.width, bottom)))


def map_rows(mode: str, size_px: tuple[int, int], read: Read, change: Change) -> PIL.Image.Image:
    """A new picture.

    Args:
        mode: its mode.
        size_px: its (width, height).
        read: gives the numbers that it is made from.
        change: makes 8-bit numbers of that mode from them; each pixel must depend on itself alone.
    """
    out = Image.new(mode, size_px)
    for top, bottom in _bands(size_px):
        out.paste(Image.fromarray(np.ascontiguousarray(change(read(top, bottom)))), (0, top))
    return out


def value_range(size_px: tuple[int, int], read: Read, name: str) -> tuple[float, float]:
    """The lowest and the highest number of a picture (ImageError: one of its numbers is not finite)."""
    lows, highs = [], []
    for top, bottom in _bands(size_px):
        rows = read(top, bottom)
        if rows.dtype.kind == "f" and not bool(np.isfinite(rows).all()):
            raise refuse(name, "some of its values are NaN or infinite", "replace them, e.g. with numpy.nan_to_num")
        lows.append(float(rows.min()))
        highs.append(float(rows.max()))
    return min(lows), max(highs)


def scale_to_8bit(size_px: tuple[int, int], read: Read, name: str) -> tuple[Change, str]:
    """How deep whole numbers or floats become 8-bit ones.

    Returns:
        The change for `map_rows`, and a note unless they are 16-bit numbers that use their range.

    Raises:
        ImageError: a number is not finite.
    """
    low, high = value_range(size_px, read, name)
    whole = read(0, 1).dtype.kind in "iu"
    if low < 0 or high > (65535.0 if whole else 255.0):
        top = (high - low) or 1.0
        note = f"values from {low:.6g} to {high:.6g} stretched to 8 bits"
        return lambda rows: _scaled(rows, low, top), note
    if not whole:
        return lambda rows: _scaled(rows, 0.0, 1.0 if high <= 1 else 255.0), ""
    ordinary = _ordinary(size_px, read)
    bits = max(8, ordinary.bit_length())
    note = ""
    if bits < 16 and high > 0:
        brighter = f" (the brightest is {high:.0f})" if high > 2**bits - 1 else ""
        note = f"values up to {ordinary}{brighter} read as {bits}-bit"
    table = _scaled(np.arange(_VALUES, dtype=np.uint16), 0.0, float(2**bits - 1))
    return lambda rows: table[rows], note


def _scaled(values: Rows, base: float, top: float) -> Rows:
    scaled = values.astype(np.float32) - np.float32(base)
    scaled *= np.float32(255.0 / top)
    return (scaled + np.float32(0.5)).clip(0, 255).astype(np.uint8)


def _ordinary(size_px: tuple[int, int], read: Read) -> int:
    """The value that all but one in a thousand of a picture's 16-bit numbers do not exceed."""
    counts = np.zeros(_VALUES, np.int64)
    for top, bottom in _bands(size_px):
        counts += np.bincount(read(top, bottom).ravel(), minlength=_VALUES)
    rank = np.ceil((counts.sum() - 1) * _QUANTILE)
    return int(np.searchsorted(np.cumsum(counts), rank, side="right"))
