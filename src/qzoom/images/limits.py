"""What a picture may cost before it is decoded, and the one form that refusals take."""

from __future__ import annotations

from typing import Annotated

from qzoom.errors import ImageError
from qzoom.settings import Between, settings

FORMAT_NAMES = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF or BMP"


@settings
class ImageLimits:
    """Limits that a picture is checked against from its header, before any pixel is decoded (ConfigError: a limit that
    no picture could meet)."""

    max_pixels: Annotated[int, Between(1)] = 100_000_000
    """Most pixels (width x height)."""
    max_bytes: Annotated[int, Between(1)] = 64 * 1024 * 1024
    """Most bytes of the encoded file."""
    max_aspect: Annotated[float, Between(1)] = 200.0
    """Longest side over shortest side, at most."""
    min_side_px: Annotated[int, Between(1)] = 2
    """Shortest side, at least."""
    max_pages: Annotated[int, Between(1, 10_000)] = 100
    """Most pages of a PDF that are read for one question; together they have at most `max_pixels`."""
    max_seconds: Annotated[float, Between(0.01, 3600)] = 60.0
    """Most seconds that drawing the pages of a PDF may take."""


def refuse(name: str, what: str, remedy: str) -> ImageError:
    """The error for a picture that cannot be used: one sentence of what and what to do. `name`: the source, as
    "'scan.png'" or "the picture bytes"."""
    return ImageError(f"Cannot read {name}: {what}; {remedy}.")


def check_bytes(count: int, name: str, limits: ImageLimits) -> None:
    """Refuse an empty or too large file (ImageError: 0 bytes or more than `max_bytes`)."""
    if count == 0:
        raise refuse(name, "it is empty (0 bytes)", "save or download the picture again")
    if count > limits.max_bytes:
        what = f"it is larger than the limit of {limits.max_bytes / 2**20:.4g} MiB"
        raise refuse(name, what, "compress the picture, or load the model with image_limits=ImageLimits(max_bytes=...)")


def check_size(size_px: tuple[int, int], name: str, limits: ImageLimits) -> None:
    """Refuse sides, pixel counts and shapes outside the limits (ImageError: too small, too many pixels, or too long a
    strip)."""
    width, height = size_px
    short, long = min(width, height), max(width, height)
    shape = f"{width} x {height} px"
    if short < limits.min_side_px:
        remedy = f"give a picture with sides of at least {limits.min_side_px} px"
        raise refuse(name, f"its {shape} are too small to look at", remedy)
    if width * height > limits.max_pixels:
        what = f"its {shape} are more than the limit of {limits.max_pixels / 1e6:.4g} megapixels"
        raise refuse(
            name, what, "shrink or cut the picture, or load the model with image_limits=ImageLimits(max_pixels=...)"
        )
    if long > limits.max_aspect * short:
        what = f"its {shape} are a strip longer than {limits.max_aspect:.4g} times its width"
        raise refuse(
            name, what, "cut the picture into pieces, or load the model with image_limits=ImageLimits(max_aspect=...)"
        )
