import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from qzoom.images.colour import apply_profile
from qzoom.images.load import load_image

from .conftest import encode, png, png_chunk

CONVERTED = "colours converted from its profile to sRGB"
UNUSED = "its colour profile cannot be used, so its colours are read as sRGB"
WIDE = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))  # Display P3, D50


def profile(primaries=None, gamma=2.2):
    """A matrix profile of these primaries (XYZ, D50), or a grey one."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [
        (b"desc", b"desc\0\0\0\0\0\0\0\2x\0" + b"\0" * 78),
        (b"cprt", b"text\0\0\0\0x\0\0\0"),
        (b"wtpt", xyz((0.9642, 1, 0.8249))),
    ]
    if primaries is None:
        tags.append((b"kTRC", curve))
    else:
        letters = (b"r", b"g", b"b")
        tags += [(letter + b"XYZ", xyz(values)) for letter, values in zip(letters, primaries, strict=True)]
        tags += [(letter + b"TRC", curve) for letter in letters]
    table, body = b"", b""
    for name, value in tags:
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    body = struct.pack(">I", len(tags)) + table + body
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">I", 128 + len(body)) + b"\0\0\0\0\2\x40\0\0mntr" + space + b"XYZ "
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    return (head + fixed(0.9642) + fixed(1) + fixed(0.8249)).ljust(128, b"\0") + body


def by_littlecms(image, icc):
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_wide_colours_become_srgb(format_name):
    image, icc = Image.new("RGB", (32, 32), (60, 200, 60)), profile(WIDE)
    options = {"lossless": True} if format_name == "WEBP" else {"quality": 100} if format_name == "JPEG" else {}
    loaded = load_image(encode(image, format_name, icc_profile=icc, **options))
    expected = by_littlecms(image, icc).getpixel((9, 9))
    assert np.abs(np.subtract(loaded.image.getpixel((9, 9)), expected)).max() <= 3
    assert loaded.notes == (CONVERTED,)


def test_profiles_and_pictures_of_other_modes():
    linear = profile(gamma=1.0)
    grey, note = apply_profile(Image.new("L", (2, 2), 55), linear)
    assert note == CONVERTED
    assert 125 <= grey.getpixel((0, 0))[0] <= 131  # 0.2157 in linear light is 128 in sRGB
    rgba, note = apply_profile(Image.new("RGBA", (2, 2), (60, 200, 60, 77)), profile(WIDE))
    assert (rgba.mode, rgba.getpixel((0, 0))[3], note) == ("RGBA", 77, CONVERTED)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 60, 200, 60])
    expected = by_littlecms(Image.new("RGB", (2, 2), (60, 200, 60)), profile(WIDE)).getpixel((0, 0))
    assert apply_profile(palette, profile(WIDE))[0].getpixel((0, 0)) == expected
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = own.index(b"para")
    linear = own[:at] + b"para" + bytes(8) + (1 << 16).to_bytes(4, "big") + own[at + 16 :]
    image = Image.new("RGB", (2, 2), (64, 128, 200))
    assert apply_profile(image, own) == (image, "")
    assert apply_profile(image, linear)[0].getpixel((0, 0)) == (137, 188, 229)
    assert apply_profile(image, linear)[1] == CONVERTED


@pytest.mark.parametrize("icc", [b"nonsense", b"\0" * (5 << 20), profile(WIDE)[:200]])
def test_a_profile_that_cannot_be_used_is_said(icc):
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    assert apply_profile(image, icc) == (image, UNUSED)


def test_profiles_that_cannot_be_used_or_change_nothing():
    assert apply_profile(Image.new("RGB", (2, 2)), profile())[1] == UNUSED
    assert apply_profile(Image.new("CMYK", (2, 2)), profile(WIDE))[1] == UNUSED
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert apply_profile(image, srgb) == (image, "")
    assert apply_profile(image, None) == (image, "")


ROWS = [bytes([55, 55, 55]) * 4] * 4


@pytest.mark.parametrize(
    ("chunks", "value", "note"),
    [
        (png_chunk(b"gAMA", struct.pack(">I", 100_000)), 128, "colours converted from gamma 1 to sRGB"),
        (png_chunk(b"gAMA", struct.pack(">I", 45_455)), 55, None),
        (png_chunk(b"sRGB", b"\0") + png_chunk(b"gAMA", struct.pack(">I", 100_000)), 55, None),
        (png_chunk(b"gAMA", struct.pack(">I", 0)), 55, None),
        (png_chunk(b"cICP", bytes([1, 13, 0, 1])), 55, None),
        (png_chunk(b"cICP", bytes([12, 13, 0, 1])), 55, "colours converted from Display P3 to sRGB"),
        (png_chunk(b"cICP", bytes([9, 16, 0, 1])), 55, "its colours are high dynamic range and are read as sRGB"),
    ],
)
def test_colour_chunks_of_png_files(chunks, value, note):
    loaded = load_image(png(4, 4, 8, 2, ROWS, chunks))
    assert abs(loaded.image.getpixel((1, 1))[0] - value) <= 1
    assert loaded.notes == ((note,) if note else ())


def test_green_of_a_wide_gamut_png_gets_stronger():
    data = png(4, 4, 8, 2, [bytes([60, 200, 60]) * 4] * 4, png_chunk(b"cICP", bytes([12, 13, 0, 1])))
    red, green, blue = load_image(data).image.getpixel((0, 0))
    assert red < 20
    assert green > 200
    assert blue < 50
