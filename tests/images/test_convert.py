import struct

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.convert import array_to_rgb, image_to_rgb
from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_image

from .conftest import encode, png, png_chunk


def pixels(image, name="x"):
    out, _ = image_to_rgb(image, name)
    assert out.mode == "RGB"
    return [tuple(p) for p in np.asarray(out).reshape(-1, 3).tolist()]


def array_pixels(array):
    out, note = array_to_rgb(np.asarray(array), "the array", ImageLimits())
    return np.asarray(out), note


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)), ("L", 77, (77, 77, 77)), ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)), ("LA", (100, 51), (224, 224, 224)), ("La", (20, 51), (224, 224, 224)),
        ("RGB", (1, 2, 3), (1, 2, 3)), ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 255), (0, 100, 200)), ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("RGBa", (0, 0, 0, 128), (127, 127, 127)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)), ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)  # fmt: skip
def test_modes(mode, value, expected):
    assert pixels(Image.new(mode, (2, 2), value)) == [expected] * 4


def test_keyed_and_palette_colours_become_white():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert pixels(image) == [(10, 20, 30)] * 4
    image.info["transparency"] = 1
    assert pixels(image) == [(255, 255, 255)] * 4
    image.info["transparency"] = bytes([255, 51])
    assert pixels(image)[0] == (206, 208, 210)
    image = Image.new("RGB", (2, 2), (9, 9, 9))
    image.putpixel((1, 1), (8, 8, 8))
    image.info["transparency"] = (9 << 8 | 9,) * 3
    assert pixels(image) == [(255, 255, 255)] * 3 + [(8, 8, 8)]
    assert image.info["transparency"] == (2313, 2313, 2313)
    lab = Image.frombytes("LAB", (2, 2), bytes([255, 0, 0]) * 4)
    assert all(min(p) >= 250 for p in pixels(lab))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bit_keeps_contrast(mode):
    order = ">u2" if mode.endswith("B") else "<u2"
    values = np.array([[0, 257, 32896, 65535]], order)
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert [p[0] for p in pixels(image)] == [0, 1, 128, 255]


def test_numbers_of_other_widths():
    image, note = image_to_rgb(Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert note == "values up to 4095 read as 12-bit"
    image, note = image_to_rgb(Image.fromarray(np.array([[0, 7, 200]], np.uint16)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 7, 200]
    assert note == "values up to 200 read as 8-bit"
    image, note = image_to_rgb(Image.fromarray(np.array([[-100, 0, 100]], np.int32)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert "stretched" in note
    assert pixels(Image.fromarray(np.array([[0, 32896, 65535]], np.int32))) == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))) == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert pixels(Image.fromarray(np.array([[0, 60, 200]], np.float32))) == [(0,) * 3, (60,) * 3, (200,) * 3]
    assert pixels(Image.fromarray(np.array([[1000, 1500, 2000]], np.float32))) == [(0,) * 3, (128,) * 3, (255,) * 3]
    with pytest.raises(ImageError, match="NaN or infinite"):
        image_to_rgb(Image.fromarray(np.array([[0, np.nan]], np.float32)), "x")


def test_metadata_are_dropped_and_the_result_is_a_copy():
    image = Image.new("RGB", (2, 2))
    image.info["exif"] = b"Exif\0\0rest"
    out, _ = image_to_rgb(image, "x")
    out.putpixel((0, 0), (9, 9, 9))
    assert out.info == {}
    assert image.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1), (3, 2, 3), (3, 2, 4)])
@pytest.mark.parametrize(
    ("dtype", "full", "half"),
    [("uint8", 255, 128), ("uint16", 65535, 32896), ("bool", True, True), ("float32", 1, 0.5), ("float64", 1, 0.5)],
)
def test_array_shapes_and_types(shape, dtype, full, half):
    array = np.full(shape, full, dtype)
    array[0, 0] = 0
    array[1, 0] = half
    if shape[-1] == 4 and len(shape) == 3:
        array[..., 3] = full
    out, _ = array_pixels(array)
    assert out.shape == (3, 2, 3)
    assert out[0, 0].tolist() == [0, 0, 0]
    assert out[1, 0].tolist() == [255 if dtype == "bool" else 128] * 3
    assert out[2, 1].tolist() == [255, 255, 255]


def test_array_colours_order_and_alpha():
    out, _ = array_pixels(np.array([[[255, 0, 10]] * 2] * 2, np.uint8))
    assert out[0, 0].tolist() == [255, 0, 10]
    out, _ = array_pixels(np.array([[[0, 0, 0, 0]] * 2] * 2, np.uint8))
    assert out[0, 0].tolist() == [255, 255, 255]
    strided = np.zeros((8, 8, 3), np.uint8)[::2, ::-2]
    assert array_pixels(strided)[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(5), "shape 5"),
        (np.array(3.0), "shape a single number"),
        (np.zeros((2, 2, 2), np.uint8), "shape 2x2x2"),
        (np.zeros((2, 50, 60), np.uint8), "2x50x60 is not that of a picture; pass height x width, or that with"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape 2x4x4x3"),
        (np.zeros((0, 5), np.uint8), "5 x 0 px"),
        (np.zeros((5, 5), object), "type object"),
        (np.zeros((5, 5), np.int64), "type int64"),
        (np.zeros((5, 5), np.complex64), "type complex64"),
        (np.full((5, 5), "a"), "type <U1"),
        (np.full((5, 5), np.nan), "NaN"),
        (np.full((5, 5), np.inf), "NaN or infinite"),
        (np.full((5, 5), 1.5), "from 1.5 to 1.5"),
        (np.full((5, 5), -0.5), "from -0.5"),
        (np.zeros((1, 60_000), np.uint8), "too small"),
        (np.broadcast_to(np.uint8(0), (30_000, 30_000)), "megapixels"),
    ],
)
def test_array_refusals(array, words):
    with pytest.raises(ImageError, match="Cannot read the array") as caught:
        array_to_rgb(array, "the array", ImageLimits())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "bits"), [(200, 8), (900, 10), (3000, 12), (7000, 13), (14720, 14), (30000, 15), (60000, 16)]
)
def test_depth_is_told_from_all_but_a_few_pixels(value, bits):
    values = np.full((40, 40), value, np.uint16)
    values[0, 0] = 65535
    image, note = image_to_rgb(Image.fromarray(values), "x")
    assert abs(image.getpixel((9, 9))[0] - 255 * value / (2**bits - 1)) <= 1
    assert (f"read as {bits}-bit" in note) == (bits < 16)
    assert ("the brightest is 65535" in note) == (bits < 16)


@pytest.mark.parametrize("value", [3000, 14720, 60000])
@pytest.mark.parametrize("kind", ["PNG", "TIFF big", "TIFF little"])
def test_sixteen_bit_colour_keeps_what_grey_keeps(value, kind):
    if kind == "PNG":
        data = png(40, 40, 16, 2, [struct.pack(">H", value) * 120] * 40)
    else:
        order = ">" if kind.endswith("big") else "<"
        entries = [(256, 3, 40), (257, 3, 40), (258, 3, 16), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, 3)]
        entries += [(278, 4, 40), (279, 4, 9600)]
        rows = b"".join(
            struct.pack(order + "HHI", tag, form, 1) + struct.pack(order + ("HH" if form == 3 else "I"), *number)
            for tag, form, value_of in entries
            for number in [(value_of, 0) if form == 3 else (value_of,)]
        )
        head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", 9608)
        data = head + struct.pack(order + "H", value) * 4800 + struct.pack(order + "H", len(entries)) + rows + bytes(4)
    grey = load_image(encode(Image.fromarray(np.full((40, 40), value, np.uint16)), "PNG"))
    loaded = load_image(data)
    assert abs(loaded.image.getpixel((9, 9))[0] - grey.image.getpixel((9, 9))[0]) <= 1  # Pillow cuts, we round
    assert loaded.notes == grey.notes


def test_orientation_survives_deep_colours():
    header_and_exif = png_chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
    loaded = load_image(png(40, 20, 16, 2, [struct.pack(">H", 3000) * 120] * 20, header_and_exif))
    assert loaded.size_px == (20, 40)
    assert loaded.image.getpixel((3, 3))[0] == 187


@pytest.mark.parametrize(("value", "expected"), [(0, 255), (65535, 0)])
def test_white_is_zero_in_deep_tiff_files(value, expected):
    entries = [(256, 3, 40), (257, 3, 40), (258, 3, 16), (259, 3, 1), (262, 3, 0), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, 40), (279, 4, 3200)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    loaded = load_image(b"II*\0" + struct.pack("<I", 3208) + struct.pack("<H", value) * 1600 + directory + bytes(4))
    assert loaded.image.getpixel((9, 9))[0] == expected
    assert "its zero is white" in loaded.notes[0]


def white_writing(mode):
    image = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (20, 10, 60, 30))
    return image.convert(mode)


@pytest.mark.parametrize(
    "source",
    [
        encode(white_writing("RGBA"), "PNG"),
        encode(white_writing("LA"), "PNG"),
        encode(white_writing("RGBA"), "WEBP", lossless=True),
        encode(white_writing("RGBA"), "GIF"),
        png(40, 40, 8, 0, [bytes(20) + b"\xff" * 20] * 40, png_chunk(b"tRNS", b"\0\0")),
        png(40, 40, 1, 0, [bytes([0, 0, 255, 255, 255])] * 40, png_chunk(b"tRNS", b"\0\0")),
        np.asarray(white_writing("RGBA")),
    ],
)
def test_white_writing_on_nothing_is_said(source):
    loaded = load_image(source)
    assert loaded.image.getextrema() == ((255, 255),) * 3
    assert ["white and lies on white" in note for note in loaded.notes] == [True]


def test_black_writing_on_nothing_and_opaque_white_need_no_note():
    image = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (20, 10, 60, 30))
    assert load_image(image).notes == ()
    assert load_image(Image.new("RGBA", (8, 8), (255, 255, 255, 255))).notes == ()
    assert load_image(Image.new("RGBA", (8, 8), (9, 9, 9, 0))).notes == ("it is wholly transparent, so it is blank",)
