"""Files with far more parts than ordinary ones, or parts far larger than the picture, are refused on their bytes."""

import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.decode import decode_bytes, picture_size
from qzoom.images.headers import check_headers
from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_image

from .conftest import encode, png_chunk

LIMITS = ImageLimits(max_pixels=50_000_000)
NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8))
JPEG, PNG = encode(NOISE, "JPEG"), encode(NOISE, "PNG")
CODES = {1: "B", 3: "H", 4: "I", 5: "Q", 12: "d", 16: "Q"}


def refusal(data):
    """What the header check says; size and pixels are refused with the same words."""
    words = set()
    for step in (check_headers, picture_size, decode_bytes):
        with pytest.raises(ImageError) as caught:
            step(data, "x", LIMITS)
        words.add(str(caught.value))
    (text,) = words
    assert text.startswith("Cannot read x: ")
    assert text.endswith(".")
    return text


def accepted(data):
    check_headers(data, "x", LIMITS)
    return picture_size(data, "x", LIMITS) == decode_bytes(data, "x", LIMITS)[0].size == (64, 64)


def jpeg_with(what):
    return JPEG[:2] + what + JPEG[2:]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (b"\xff\xfe\x00\x02" * 250_000, "it has more than 2000 segments"),
        (b"\xff\xd8" * 40_000, "it has more than 2000 segments"),
        (b"\xff\xd9" * 40_000, "it has more than 2000 segments"),
        (b"\xff\xc8" * 40_000, "it has more than 2000 segments"),
        (b"\xff\xfd" * 40_000, "it has more than 2000 segments"),
        (b"\xff\xfe\x00\x00" * 3000, "it has more than 2000 segments"),
        (b"\xff\xe0\x00\x10" + bytes(14) + b"\0" * 70_000, "it has more than 65536 stray bytes before its pixels"),
        (b"\xff\xd0" * 40_000, "it has more than 65536 stray bytes before its pixels"),
        (b"\xff" * 70_000, "it has more than 65536 stray bytes before its pixels"),
    ],
)
def test_jpeg_files_of_many_parts(what, words):
    assert words in refusal(jpeg_with(what))


def test_jpeg_files_of_many_scans():
    data = encode(NOISE, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert accepted(data[:at] + data[at:-2] * 40 + data[-2:])
    assert "it has more than 64 scans" in refusal(data[:at] + data[at:-2] * 80 + data[-2:])


def test_ordinary_jpeg_files():
    assert accepted(JPEG)
    assert accepted(jpeg_with(b"\xff\xfe\x00\x02" * 1900))
    assert accepted(jpeg_with(b"\xff" * 60_000))
    inside = b"\xff\xd8" + b"\xff\xfe\x00\x02" * 5000  # parts of a thumbnail are bytes of one segment
    assert accepted(jpeg_with(b"\xff\xe1" + struct.pack(">H", 2 + len(inside)) + inside))
    assert accepted(JPEG + b"\xff\xfe\x00\x02" * 5000)  # after the end of the picture


def test_png_files_of_many_chunks():
    chunk = png_chunk(b"prIv", b"")
    check_headers(PNG[:33] + chunk * 65_000 + PNG[33:], "x", LIMITS)
    assert "it has more than 65536 chunks" in refusal(PNG[:33] + chunk * 66_000 + PNG[33:])
    assert "it has more than 65536 chunks" in refusal(PNG[:-12] + chunk * 66_000 + PNG[-12:])


def tiff(tags, packed, order="<", big=False):
    """A TIFF of tags (number, kind, values); the packed pixels follow the directory, as "AT" among the values tells."""
    head, space, offset = ("Q", 8, "Q") if big else ("H", 4, "I")
    start = 16 if big else 8
    at = start + struct.calcsize("<" + head) + len(tags) * (4 + 2 * space) + space
    body, apart = b"", b""
    for number, kind, given in tags:
        values = [at if value == "AT" else value for value in (given if isinstance(given, list) else [given])]
        written = struct.pack(f"{order}{len(values)}{CODES[kind]}", *values)
        field = written.ljust(space, b"\0")
        if len(written) > space:
            field, apart = struct.pack(order + offset, at + len(packed) + len(apart)), apart + written
        body += struct.pack(order + ("HHQ" if big else "HHI"), number, kind, len(values)) + field
    first = struct.pack(order + "HHQ", 8, 0, 16) if big else struct.pack(order + "I", 8)
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    return mark + first + struct.pack(order + head, len(tags)) + body + bytes(space) + packed + apart


GREY = [(256, 4, 64), (257, 4, 64), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]  # deflate


def tiled(*tile_tags, pixels=64 * 64, **options):
    packed = zlib.compress(bytes(pixels))
    return tiff([*GREY, *tile_tags, (324, 4, "AT"), (325, 4, len(packed))], packed, **options)


KINDS = [{"order": "<"}, {"order": ">"}, {"order": "<", "big": True}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize(("kind", "side"), [(3, 12_000), (4, 12_000), (16, 12_000), (4, 2**31), (16, 2**40)])
def test_tiles_far_larger_than_the_picture(options, kind, side):
    text = refusal(tiled((322, kind, side), (323, kind, side), **options))
    assert f"its tiles of {side} x {side} px are too large for a picture of 64 x 64 px; save it again with" in text
    assert f"its tiles of 64 x {side} px" in refusal(tiled((322, 3, 64), (323, kind, side), **options))
    assert f"its tiles of {side} x 64 px" in refusal(tiled((322, kind, side), (323, 3, 64), **options))


def test_tiles_that_are_named_twice():
    small, large = [(322, 3, 64), (323, 3, 64)], [(322, 3, 12_000), (323, 3, 12_000)]
    assert "its tiles of 12000 x 12000 px" in refusal(tiled(*small, *large))
    assert "its tiles of 12000 x 12000 px" in refusal(tiled(*large, *small))
    assert "12000 px are too large for a picture of 64 x 64" in refusal(tiled((256, 4, 12_000), *large))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("side", [16, 64, 256, 512, 2048])
def test_ordinary_tiles(options, side):
    packed = zlib.compress(bytes(side * side))
    count = (max(64, side) // side) ** 2
    places = [(324, 4, ["AT"] * count), (325, 4, [len(packed)] * count)]
    assert accepted(tiff([*GREY, (322, 3, side), (323, 3, side), *places], packed, **options))


def test_tiles_count_against_the_pixel_limit():
    sides = [(256, 4, 6000), (257, 4, 6000), *GREY[2:], (322, 3, 6144), (323, 3, 6144)]
    data = tiff([*sides, (324, 4, "AT"), (325, 4, 1)], b"x")
    check_headers(data, "x", ImageLimits(max_pixels=40_000_000))
    with pytest.raises(ImageError, match="its tiles of 6144 x 6144 px are too large for a picture of 6000 x 6000 px"):
        check_headers(data, "x", ImageLimits(max_pixels=37_000_000))


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ([(322, 3, 1), (323, 3, 1), (324, 4, [8] * 65_537)], "it has more than 65536 strips or tiles"),
        ([(278, 3, 1), (273, 4, [8] * 65_537)], "it has more than 65536 strips or tiles"),
        ([(273, 4, 8), (279, 4, [8] * 65_537)], "it has more than 65536 strips or tiles"),
        ([(282, 5, [1] * 200_000)], "its tag 282 has more than 196608 values"),
        ([(60_000 + i, 1, 1) for i in range(4100)], "it has more than 4096 tags"),
    ],
)
def test_tiff_files_of_many_parts(tags, words):
    for options in KINDS:
        assert words in refusal(tiff([*GREY, *tags], b"", **options))


def test_private_tags_and_many_strips_are_ordinary():
    strips = [(273, 4, ["AT"] * 64), (278, 3, 1), (279, 4, [len(zlib.compress(bytes(64)))] * 64)]
    private = [(40_000, 12, [0.5] * 300_000), (50_000, 1, [0] * 500_000)]
    for options in KINDS:
        assert accepted(tiff([*GREY, *strips, *private], zlib.compress(bytes(64)), **options))


def test_parts_that_overlap():
    block = b"\0\0\0\xff\xff"  # no pixels
    packed = zlib.compress(bytes(64))[:2] + block * 200_000 + zlib.compress(bytes(64))[2:]
    strips = [(273, 4, ["AT"] * 64), (278, 3, 1), (279, 4, [len(packed)] * 64)]
    assert accepted(tiff([*GREY, *strips], packed))
    strips = [(273, 4, ["AT"] * 100), (278, 3, 1), (279, 4, [len(packed)] * 100)]
    assert "its strips or tiles overlap" in refusal(tiff([*GREY, *strips], packed))
    data = bytearray(tiff([*GREY, *((40_000 + i, 1, [0] * 1000) for i in range(50))], b""))
    for i in range(50):
        struct.pack_into("<I", data, 8 + 2 + (6 + i) * 12 + 4, 40_000)  # values that each tag says it has
    assert "its tags are together larger than the file" in refusal(bytes(data))


def test_a_big_endian_bigtiff_is_named():
    text = refusal(tiled((322, 3, 64), (323, 3, 64), order=">", big=True))
    assert "it is a big-endian BigTIFF, which cannot be read here; save it again as an ordinary TIFF, or as PNG" in text


def test_any_bytes_pass_or_are_refused():
    draw = random.Random(4)
    for start in (*(tiled((322, 3, 64), (323, 16, 64), **options) for options in KINDS), JPEG, PNG):
        check_headers(start, "x", LIMITS)
        for _ in range(400):
            changed = bytearray(start[: draw.choice((len(start), draw.randrange(6, len(start))))])
            for _ in range(draw.randint(1, 9)):
                changed[draw.randrange(4, len(changed))] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
            try:
                check_headers(bytes(changed), "x", LIMITS)
            except ImageError as error:
                assert str(error).startswith("Cannot read x: ")  # noqa: PT017  both outcomes are right


def damaged(kind, data):
    return struct.pack(">I", len(data)) + kind + data + bytes(4)


def test_the_size_of_a_damaged_png_is_read_without_its_pixels(monkeypatch):
    metadata = PNG[:33] + damaged(b"tEXt", b"a\0bc") + PNG[33:]
    assert load_image(metadata).notes == ("metadata that are damaged or too large were left out",)
    pixels = bytearray(metadata)
    pixels[-30] ^= 1
    header = PNG[:19] + b"\x41" + PNG[20:]  # its check sum no longer fits
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # pixels cannot be decoded
    assert picture_size(metadata, "x", LIMITS) == (64, 64)
    with pytest.raises(ImageError, match="damaged or cut off"):
        picture_size(bytes(pixels), "x", LIMITS)
    with pytest.raises(ImageError, match="damaged or cut off"):
        picture_size(header[:33] + damaged(b"tEXt", b"a\0bc") + header[33:], "x", LIMITS)
    with pytest.raises(ImageError, match="are more than the limit of 0"):
        picture_size(metadata, "x", ImageLimits(max_pixels=4000))
