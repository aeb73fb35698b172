"""Changes in bands of rows: the same pixels as a computation on the whole picture, and little memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from qzoom.images.convert import array_to_rgb
from qzoom.images.decode import decode_bytes
from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_image

from .conftest import encode, png, png_chunk
from .test_colour import WIDE, profile

WIDTH, HEIGHT = 1300, 1000  # about twenty bands
P3 = png_chunk(b"cICP", bytes([12, 13, 0, 1]))
BT2020 = png_chunk(b"cICP", bytes([9, 13, 0, 1]))
MATRICES = {  # linear light to linear sRGB
    P3: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
}


def noise(most, dtype, *shape):
    return np.random.default_rng(5).integers(0, most + 1, shape, dtype)


def png_of(values, extra=b""):
    """A PNG file of (height, width[, 3 or 4]) numbers of 8 or 16 bits."""
    height, width = values.shape[:2]
    kind = {1: 0, 3: 2, 4: 6}[values[0, 0].size]
    rows = values.astype(">u2" if values.dtype == np.uint16 else np.uint8).reshape(height, -1)
    return png(width, height, 8 * values.dtype.itemsize, kind, [row.tobytes() for row in rows], extra)


@pytest.mark.parametrize("chunk", [P3, BT2020])
def test_wide_colours_are_those_of_the_whole_picture(chunk):
    values = noise(255, np.uint8, 500, 401, 3)
    encoded = values.astype(np.float32) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    mixed = np.clip(light @ np.array(MATRICES[chunk], np.float32).T, 0, 1)
    srgb = np.where(mixed <= 0.0031308, mixed * 12.92, 1.055 * np.maximum(mixed, 1e-9) ** (1 / 2.4) - 0.055)
    expected = (srgb * 255 + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(load_image(png_of(values, chunk)).image), expected)


@pytest.mark.parametrize(
    ("chunk", "colour", "expected"),
    [
        (P3, (60, 200, 60), (0, 203, 11)), (P3, (200, 120, 90), (213, 115, 83)), (P3, (10, 128, 250), (0, 130, 255)),
        (BT2020, (60, 200, 60), (0, 211, 0)), (BT2020, (200, 120, 90), (236, 105, 82)),
    ],
)  # fmt: skip
def test_wide_colours_of_known_value(chunk, colour, expected):
    values = np.full((4, 4, 3), colour, np.uint8)
    assert load_image(png_of(values, chunk)).image.getpixel((1, 1)) == expected


@pytest.mark.parametrize(("most", "bits"), [(200, 8), (1000, 10), (4095, 12), (30_000, 15), (65_535, 16)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_deep_numbers_are_those_of_the_whole_picture(most, bits, channels):
    values = noise(most, np.uint16, 300, 501, *channels)
    values[0, 0] = 65_535
    scaled = values.astype(np.float32) * np.float32(255.0 / (2**bits - 1)) + np.float32(0.5)
    expected = scaled.clip(0, 255).astype(np.uint8)
    ordinary = np.quantile(values, 0.999, method="higher")
    by_array, note = array_to_rgb(values, "x", ImageLimits())
    by_file, _, notes = decode_bytes(png_of(values), "x", ImageLimits())
    assert notes == ((note,) if note else ())
    assert (f"values up to {ordinary} (the brightest is 65535) read as {bits}-bit" == note) == (bits < 16)
    for image, far in ((by_array, 0), (by_file, 1 if channels and bits == 16 else 0)):  # there Pillow cuts, we round
        found = np.asarray(image) if channels else np.asarray(image)[..., 0]
        assert np.abs(found.astype(int) - expected).max() <= far


def test_numbers_of_four_bytes_are_those_of_the_whole_picture():
    whole = noise(90_000, np.int32, 300, 501) - 20_000
    image = load_image(Image.fromarray(whole)).image
    stretched = (whole - whole.min()).astype(np.float32) * np.float32(255.0 / float(whole.max() - whole.min()))
    assert np.array_equal(np.asarray(image)[..., 0], (stretched + np.float32(0.5)).astype(np.uint8))
    floats = np.random.default_rng(5).random((300, 501), np.float32)
    image = load_image(Image.fromarray(floats)).image
    assert np.array_equal(np.asarray(image)[..., 0], (floats * np.float32(255) + np.float32(0.5)).astype(np.uint8))
    out, _ = array_to_rgb(np.float64(floats), "x", ImageLimits())
    assert np.array_equal(np.asarray(out)[..., 0], (floats * 255 + 0.5).astype(np.uint8))


def rows(most, dtype, *channels):
    """HEIGHT rows of the same noise, which are quick to pack."""
    return np.repeat(noise(most, dtype, 1, WIDTH, *channels), HEIGHT, axis=0)


def pictures():
    """Name and file of a picture for each way in which colours are changed."""
    rgb, grey = rows(255, np.uint8, 3), rows(3000, np.uint16)
    rgba = rows(255, np.uint8, 4)
    deep, deep_clear = rows(3000, np.uint16, 3), rows(3000, np.uint16, 4)
    plain, icc = Image.fromarray(rgb), profile(WIDE)
    yield "alpha", png_of(rgba)
    yield "alpha of 8-bit grey", encode(Image.fromarray(rgba).convert("LA"), "PNG")
    yield "palette", encode(plain.quantize(64), "PNG")
    yield "wide", png_of(rgb, P3)
    yield "wide with alpha", png_of(rgba, BT2020)
    yield "gamma", png_of(rgb, png_chunk(b"gAMA", struct.pack(">I", 100_000)))
    yield "profile", encode(plain, "PNG", icc_profile=icc)
    yield "profile with alpha", encode(Image.fromarray(rgba), "PNG", icc_profile=icc)
    yield "16-bit colours", png_of(deep)
    yield "16-bit colours with alpha", png_of(deep_clear)
    yield "bright 16-bit colours", png_of(rows(65_535, np.uint16, 3))
    yield "16-bit grey", png_of(grey)
    yield "16-bit grey with a clear one", png_of(grey, png_chunk(b"tRNS", struct.pack(">H", 9)))
    yield "16-bit TIFF", encode(Image.fromarray(grey), "TIFF")
    yield "32-bit TIFF", encode(Image.fromarray(grey.astype(np.int32)), "TIFF")
    yield "stretched TIFF", encode(Image.fromarray(grey.astype(np.int32) - 1500), "TIFF")
    yield "float TIFF", encode(Image.fromarray(grey.astype(np.float32)), "TIFF")
    yield "CMYK TIFF", encode(plain.convert("CMYK"), "TIFF")
    yield "JPEG without its end", encode(plain, "JPEG", quality=60)[:-2]


def peak_of(data):
    """Most bytes that numpy and Python hold while a file is decoded; Pillow's own pixels are not among them."""
    tracemalloc.start()
    try:
        image, _, _ = decode_bytes(data, "x", ImageLimits())
        assert image.size == (WIDTH, HEIGHT)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_colours_take_much_more_memory_than_plain_ones():
    plain = peak_of(png_of(rows(255, np.uint8, 3)))
    more = {name: (peak_of(data) - plain) / (WIDTH * HEIGHT) for name, data in pictures()}
    assert len(more) == 19
    assert {name: bytes_a_pixel for name, bytes_a_pixel in more.items() if bytes_a_pixel > 5} == {}


@pytest.mark.parametrize("dtype", ["bool", "uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_take_little_memory(dtype, channels):
    array = np.ones((HEIGHT, WIDTH, *channels), dtype)
    tracemalloc.start()
    image, _ = array_to_rgb(array, "x", ImageLimits())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.size == (WIDTH, HEIGHT)
    assert peak < 5 * WIDTH * HEIGHT
