"""Encoded bytes to RGB: recognise, check the header against the limits, decode the first picture, rotate, convert.

The format is told from the first bytes and handed to that one decoder, so nothing outside the list below is ever tried.
Decoder errors become one sentence of ours; their own texts are not passed on. The parts of a file are checked
(`headers`) and its pages or frames counted on the bytes, without decoding and in bounded time.
"""

from __future__ import annotations

import io
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import PIL.Image
from PIL import Image, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from qzoom.images.colour import apply_png_colours
from qzoom.images.convert import deep_colours, image_to_rgb
from qzoom.images.headers import check_headers
from qzoom.images.limits import FORMAT_NAMES, ImageLimits, check_bytes, check_size, refuse
from qzoom.images.repair import jpeg_fillers, readable_png, same_pixels, unsupported_kind

_MAX_STEPS = 1_000_000  # blocks walked in a GIF, about 0.3 s at worst
_MAX_PAGES = 10_000


def frame_note(data: bytes, format_name: str, decoder_frames: int) -> str:
    """A note such as "first of 3 pages", or an empty text for a file that holds one picture. `decoder_frames`: frames
    that the decoder knows of without seeking (PNG, WebP, AVIF, HEIF); 1 otherwise."""
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
    (b"%PDF", "a PDF", "give it where several pictures may stand, or render the page to PNG"),
    (b"%!PS", "PostScript", "render the page to PNG first"),
    (b"PK\x03\x04", "a ZIP archive or office document", "unpack it or export the page as PNG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000", "convert it to PNG or JPEG"),
    (b"\xff\x0a", "JPEG XL", "convert it to PNG or JPEG"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL", "convert it to PNG or JPEG"),
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
_KNOWN_FRAMES = ("PNG", "WebP", "AVIF", "HEIF")


def decode_bytes(data: bytes, name: str, limits: ImageLimits) -> tuple[PIL.Image.Image, str, tuple[str, ...]]:
    """The first picture of an encoded file.

    Args:
        limits: checked on the header, before pixels are decoded.

    Returns:
        The RGB picture after EXIF rotation, the format's name, and notes.

    Raises:
        ImageError: not a picture, of another format, damaged, or outside the limits.
    """
    opened, format_name, repaired = _decoded(data, name, limits)
    frames = int(getattr(opened, "n_frames", 1)) if format_name in _KNOWN_FRAMES else 1
    pages = frame_note(data, format_name, frames)
    image, deep = _all_bits(data, opened, name, limits)
    colours = ""
    if format_name == "PNG" and not image.mode.startswith("I"):
        image, colours = apply_png_colours(image, data)
    rgb, notes = finish_image(image, name, orientation=_orientation(opened))
    return rgb, format_name, tuple(filter(None, (pages, repaired, deep, colours, *notes)))


def _decoded(data: bytes, name: str, limits: ImageLimits) -> tuple[ImageFile, str, str]:
    """The decoded picture, its format's name, and a note on harmless damage that was passed over."""
    try:
        return *_load_pixels(data, name, limits), ""
    except _DecoderError as error:
        if (repaired := readable_png(data)) is not None:
            try:
                return *_load_pixels(repaired, name, limits), "metadata that are damaged or too large were left out"
            except _DecoderError:
                pass
        if (closed := jpeg_fillers(data)) is not None:
            try:
                first, second = (_load_pixels(attempt, name, limits) for attempt in closed)
                if same_pixels(first[0], second[0]):
                    return *first, "its end marker is missing"
            except _DecoderError:
                pass
        raise _unreadable(name, data) from error


class _DecoderError(Exception):
    """A decoder's own failure, of whatever kind."""


def _load_pixels(data: bytes, name: str, limits: ImageLimits) -> tuple[ImageFile, str]:
    image, format_name = _open(data, name, limits)
    try:
        with _no_bomb_warning(image.size):
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, limits) from error
    except Exception as error:
        raise _DecoderError from error
    return image, format_name


def _all_bits(data: bytes, image: ImageFile, name: str, limits: ImageLimits) -> tuple[PIL.Image.Image, str]:
    """A picture whose file has 16 bits a colour with all bits that it uses; Pillow itself keeps the high byte only."""
    if image.mode not in ("RGB", "RGBA", "RGBX") or not data.startswith((b"\x89PNG", b"II", b"MM")):
        return image, ""
    if _bright(image):
        return image, ""
    try:
        again, _ = _open(data, name, limits)
        swapped = [tile._replace(args=_other_byte(tile.args)) for tile in again.tile]
        if all(new.args == old.args for new, old in zip(swapped, again.tile, strict=True)):
            return image, ""
        again.tile = swapped
        with _no_bomb_warning(again.size):
            again.load()
    except Exception:  # no second way to read it: the high bytes are what there is
        return image, ""
    return deep_colours(image, again, name)


def _bright(image: PIL.Image.Image) -> bool:
    """Whether more than one in a thousand values use the highest bit."""
    counts = image.convert("RGB").histogram()
    return sum(sum(counts[at + 128 : at + 256]) for at in (0, 256, 512)) > 0.001 * sum(counts)


def _other_byte(args: Any) -> Any:
    """A decoder's arguments that take the low byte of each 16-bit value where they take the high one."""
    swap = {";16B": ";16L", ";16L": ";16B"}
    swap[";16N"] = ";16B" if sys.byteorder == "little" else ";16L"

    def other(value: Any) -> Any:
        if isinstance(value, str) and value[-4:] in swap:
            return value[:-4] + swap[value[-4:]]
        return value

    return tuple(other(value) for value in args) if isinstance(args, tuple) else other(args)


def picture_size(data: bytes, name: str, limits: ImageLimits) -> tuple[int, int]:
    """(width, height) in px from the header of an encoded file, before EXIF rotation; no pixel is decoded.

    Args:
        limits: what the size and the byte count are checked against.

    Raises:
        ImageError: as `decode_bytes`, for all that the header tells; damage to the pixels is not found.
    """
    check_bytes(len(data), name, limits)
    try:
        return _open(data, name, limits)[0].size
    except _DecoderError as error:
        if (repaired := readable_png(data)) is not None:
            try:
                return _open(repaired, name, limits)[0].size
            except _DecoderError:
                pass
        raise _unreadable(name, data) from error


def _open(data: bytes, name: str, limits: ImageLimits) -> tuple[ImageFile, str]:
    """The lazily opened picture, within the limits, and its format's name."""
    decoder = _decoder_of(data, name)
    check_headers(data, name, limits)
    try:
        image = decoder(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, limits) from error
    except Exception as error:  # a decoder given hostile bytes may raise anything
        raise _DecoderError from error
    check_size(image.size, name, limits)
    return image, "WebP" if image.format == "WEBP" else str(image.format)


def finish_image(
    image: PIL.Image.Image, name: str, *, orientation: int | None = None
) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """A decoded picture as a new RGB one, EXIF rotation applied, with notes (ImageError: values that cannot be shown).
    `orientation`: the EXIF orientation; None reads it from the picture."""
    rgb, note = image_to_rgb(image, name)
    transpose = _TRANSPOSE.get(_orientation(image) if orientation is None else orientation)
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
        return _phone_decoder(data, name)
    if any(known.startswith(data) for known, _ in _DECODERS):
        raise _damaged(name, data)
    raise refuse(name, f"it is not a picture of a known format ({FORMAT_NAMES})", "convert it to one of these")


_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def _phone_decoder(data: bytes, name: str) -> type[ImageFile]:
    """The decoder of AVIF or HEIC, which share a container with video; its brands tell which it is."""
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
    decoder: type[ImageFile]
    if brands & _AVIF:
        if not features.check("avif"):
            raise refuse(name, "it is AVIF, which this build of Pillow cannot read", "convert it to PNG or JPEG")
        from PIL.AvifImagePlugin import AvifImageFile as decoder
    elif brands & _HEIC:
        try:
            from pillow_heif import HeifImageFile as decoder
        except ImportError as error:
            what = "it is HEIC, and pillow-heif is not installed"
            raise refuse(name, what, "install qzoom[heic], or save it as PNG or JPEG") from error
    else:
        raise refuse(name, f"it is a video, not {FORMAT_NAMES}", "give a picture of one of its frames")
    return decoder


@contextmanager
def _no_bomb_warning(size_px: tuple[int, int]) -> Iterator[None]:
    """Silence Pillow's own size warning for pictures that our limits allow; nothing is touched for the others."""
    if Image.MAX_IMAGE_PIXELS is None or size_px[0] * size_px[1] <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _unreadable(name: str, data: bytes) -> Exception:
    """The error for a file that its decoder refuses."""
    kind = unsupported_kind(data)
    if kind:
        return refuse(name, f"it is {kind}, which cannot be read here", "save it as PNG or JPEG")
    return _damaged(name, data)


def _damaged(name: str, data: bytes) -> Exception:
    return refuse(name, f"it is damaged or cut off ({len(data)} bytes)", "save or download the picture again")


def _too_large(name: str, limits: ImageLimits) -> Exception:
    return refuse(
        name,
        f"it unpacks to more pixels than can be decoded safely (limit {limits.max_pixels / 1e6:.4g} megapixels)",
        "shrink or cut the picture",
    )
