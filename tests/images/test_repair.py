import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.load import load_image
from qzoom.images.repair import unsupported_kind

from .conftest import encode, png_chunk

LEFT_OUT = "metadata that are damaged or too large were left out"
GREY = encode(Image.new("RGB", (40, 40), (64, 64, 64)), "PNG")
NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 70, 3), np.uint8))


def broken_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ 1)


def refusal(data):
    with pytest.raises(ImageError) as caught:
        load_image(data)
    return str(caught.value)


@pytest.mark.parametrize(
    "chunk",
    [
        broken_chunk(b"tEXt", b"A\0abc"), broken_chunk(b"pHYs", struct.pack(">IIB", 1, 1, 0)),
        broken_chunk(b"tIME", bytes(7)), broken_chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0"), broken_chunk(b"prIv", b"abc"),
        png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 1_100_000)),
        png_chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * 1_100_000)),
    ],
)  # fmt: skip
def test_damaged_or_huge_metadata_cost_no_picture(chunk):
    loaded = load_image(GREY[:33] + chunk + GREY[33:])
    assert loaded.image.getpixel((9, 9)) == (64, 64, 64)
    assert loaded.notes == (LEFT_OUT,)


def test_damaged_pixels_stay_an_error():
    noise = encode(NOISE, "PNG")
    at = noise.index(b"IDAT") + 40
    assert "damaged" in refusal(noise[:at] + bytes([noise[at] ^ 1]) + noise[at + 1 :])
    header = bytearray(GREY)
    header[29] ^= 1  # check sum of the header
    assert "damaged" in refusal(bytes(header))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_read(progressive):
    data = encode(NOISE, "JPEG", progressive=progressive)
    loaded = load_image(data[:-2])
    assert np.array_equal(np.asarray(loaded.image), np.asarray(load_image(data).image))
    assert loaded.notes == ("its end marker is missing",)


@pytest.mark.parametrize("cut", [3, 20, 128, 600])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_last_pixels_is_damaged(cut, progressive):
    assert "damaged or cut off" in refusal(encode(NOISE, "JPEG", progressive=progressive)[:-cut])


def tiff_with(tag, kind, value):
    data = bytearray(encode(Image.new("RGB", (8, 8)), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            struct.pack_into("<HHII", data, at, tag, kind, 1, value)
    return bytes(data)


def jpeg_with(marker, bits=8):
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, bits
    return bytes(data)


def bmp_with(method):
    data = bytearray(encode(Image.new("RGB", (16, 16)), "BMP"))
    struct.pack_into("<I", data, 30, method)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff_with(259, 3, 34887), "a TIFF with LERC compression"),
        (tiff_with(259, 3, 34712), "a TIFF with JPEG 2000 compression"),
        (jpeg_with(0xC3), "a lossless JPEG"),
        (jpeg_with(0xC0, bits=12), "a JPEG with 12 bits a channel"),
        (bmp_with(4), "a BMP with a JPEG inside"),
        (bmp_with(5), "a BMP with a PNG inside"),
    ],
)
def test_kinds_that_cannot_be_read_here_are_not_called_damaged(data, words):
    text = refusal(data)
    assert f"it is {words}, which cannot be read here" in text
    assert "damaged" not in text


@pytest.mark.parametrize(("bits", "form", "words"), [(16, 3, "16-bit floating"), (64, 3, "64-bit floating")])
def test_number_formats_of_tiff_files_are_named(bits, form, words):
    entries = [(256, 3, 8), (257, 3, 8), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 8), (279, 4, 8 * bits), (339, 3, form)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    data = b"II*\0" + struct.pack("<I", 8 + 8 * bits) + bytes(8 * bits) + directory + bytes(4)
    assert words in refusal(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"BM", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*" + bytes(40)]
)
def test_naming_a_kind_never_fails(data):
    assert unsupported_kind(data) == ""
