"""Encoded bytes to RGB: recognise, check the header against the limits, decode the first picture, rotate, convert.

The format is told from the first bytes and handed to that one decoder, so nothing outside the list below is ever tried.
Decoder errors become one sentence of ours; their own texts are not passed on.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import PIL.Image
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from qzoom.images.convert import image_to_rgb
from qzoom.images.frames import frame_note
from qzoom.images.limits import FORMAT_NAMES, ImageLimits, check_bytes, check_size, refuse
from qzoom.images.scans import MAX_SCANS, count_scans

__all__ = ["decode_bytes", "finish_image", "picture_size"]

_DECODERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"II*\x00", TiffImageFile),
    (b"MM\x00*", TiffImageFile),
    (b"II+\x00", TiffImageFile),
    (b"MM\x00+", TiffImageFile),
    (b"BM", BmpImageFile),
)
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF", "a PDF", "render the page to PNG first"),
    (b"%!PS", "PostScript", "render the page to PNG first"),
    (b"PK\x03\x04", "a ZIP archive or office document", "unpack it or export the page as PNG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000", "convert it to PNG or JPEG"),
    (b"8BPS", "a Photoshop file", "export it as PNG or JPEG"),
    (b"\x00\x00\x01\x00", "an icon file", "convert it to PNG"),
)
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_LOCK = threading.Lock()


def decode_bytes(data: bytes, name: str, limits: ImageLimits) -> tuple[PIL.Image.Image, str, tuple[str, ...]]:
    """The first picture of an encoded file.

    Args:
        data: the file's bytes, not empty.
        name: the source, for errors.
        limits: checked on the header, before pixels are decoded.

    Returns:
        The RGB picture after EXIF rotation, the format's name, and notes.

    Raises:
        ImageError: not a picture, of another format, damaged, or outside the limits.
    """
    image, format_name = _open(data, name, limits)
    size_px = image.size
    try:
        with _no_bomb_warning(size_px):
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, limits) from error
    except Exception as error:
        raise _damaged(name, data) from error
    rgb, notes = finish_image(image, name)
    pages = frame_note(data, format_name, int(getattr(image, "n_frames", 1)) if format_name in ("PNG", "WebP") else 1)
    return rgb, format_name, ((pages,) if pages else ()) + notes


def picture_size(data: bytes, name: str, limits: ImageLimits) -> tuple[int, int]:
    """(width, height) in px from the header of an encoded file, before EXIF rotation; no pixel is decoded.

    Args:
        data: the file's bytes.
        name: the source, for errors.
        limits: what the size, the byte count and the number of scans are checked against.

    Raises:
        ImageError: as `decode_bytes`, for all that the header tells.
    """
    check_bytes(len(data), name, limits)
    return _open(data, name, limits)[0].size


def _open(data: bytes, name: str, limits: ImageLimits) -> tuple[ImageFile, str]:
    """The lazily opened picture, within the limits, and its format's name."""
    decoder = _decoder_of(data, name)
    if decoder is JpegImageFile and count_scans(data) > MAX_SCANS:
        raise refuse(name, f"it has more than {MAX_SCANS} scans", "save it again as an ordinary JPEG")
    try:
        image = decoder(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, limits) from error
    except Exception as error:  # a decoder given hostile bytes may raise anything
        raise _damaged(name, data) from error
    check_size(image.size, name, limits)
    return image, "WebP" if image.format == "WEBP" else str(image.format)


def finish_image(image: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """A decoded picture as a new RGB one, EXIF rotation applied, with notes.

    Args:
        image: decoded.
        name: the source, for errors.

    Raises:
        ImageError: values that cannot be shown.
    """
    rgb, note = image_to_rgb(image, name)
    transpose = _TRANSPOSE.get(_orientation(image))
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    return rgb, (note,) if note else ()


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation; 1 when there is none or the metadata are damaged, since the pixels are still good."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        return int(value)
    except Exception:
        return 1


def _decoder_of(data: bytes, name: str) -> type[ImageFile]:
    for magic, decoder in _DECODERS:
        if data.startswith(magic):
            return decoder
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    for magic, what, remedy in _OTHERS:
        if data.startswith(magic):
            raise refuse(name, f"it is {what}, not {FORMAT_NAMES}", remedy)
    head = data[:2048].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"<svg") or (head.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in head):
        raise refuse(name, f"it is an SVG drawing, not {FORMAT_NAMES}", "render it to PNG first")
    if head.startswith((b"<!doctype html", b"<html")):
        raise refuse(name, "it is a web page, not a picture", "download the picture itself")
    if data[4:8] == b"ftyp":
        raise refuse(name, f"it is HEIC, AVIF or video, not {FORMAT_NAMES}", "convert it to PNG or JPEG")
    if any(known.startswith(data) for known, _ in _DECODERS):
        raise _damaged(name, data)
    raise refuse(name, f"it is not a picture of a known format ({FORMAT_NAMES})", "convert it to one of these")


@contextmanager
def _no_bomb_warning(size_px: tuple[int, int]) -> Iterator[None]:
    """Silence Pillow's own size warning for pictures that our limits allow; nothing is touched for the others."""
    if Image.MAX_IMAGE_PIXELS is None or size_px[0] * size_px[1] <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _damaged(name: str, data: bytes) -> Exception:
    return refuse(name, f"it is damaged or cut off ({len(data)} bytes)", "save or download the picture again")


def _too_large(name: str, limits: ImageLimits) -> Exception:
    return refuse(
        name,
        f"it unpacks to more pixels than can be decoded safely (limit {limits.max_pixels / 1e6:.4g} megapixels)",
        "shrink or cut the picture",
    )
