import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.convert import array_to_rgb, image_to_rgb
from qzoom.images.limits import ImageLimits


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
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 51), (224, 224, 224)),
        ("La", (20, 51), (224, 224, 224)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 100, 200, 255), (0, 100, 200)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("RGBa", (0, 0, 0, 128), (127, 127, 127)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_modes(mode, value, expected):
    assert pixels(Image.new(mode, (2, 2), value)) == [expected] * 4


def test_lab():
    lab = Image.frombytes("LAB", (2, 2), bytes([255, 0, 0]) * 4)
    assert all(min(p) >= 250 for p in pixels(lab))


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert pixels(image) == [(10, 20, 30)] * 4
    image.info["transparency"] = 1
    assert pixels(image) == [(255, 255, 255)] * 4
    image.info["transparency"] = bytes([255, 51])
    assert pixels(image)[0] == (206, 208, 210)


def test_keyed_colour_becomes_white_and_the_source_is_untouched():
    image = Image.new("RGB", (2, 2), (9, 9, 9))
    image.putpixel((1, 1), (8, 8, 8))
    image.info["transparency"] = (9 << 8 | 9,) * 3
    assert pixels(image) == [(255, 255, 255)] * 3 + [(8, 8, 8)]
    assert image.info["transparency"] == (2313, 2313, 2313)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bit_keeps_contrast(mode):
    order = ">u2" if mode.endswith("B") else "<u2"
    values = np.array([[0, 257, 32896, 65535]], order)
    image = Image.frombytes(mode, (4, 1), values.tobytes())
    assert [p[0] for p in pixels(image)] == [0, 1, 128, 255]


def test_twelve_and_eight_bits_in_sixteen():
    image, note = image_to_rgb(Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert note == "values up to 4095 read as 12-bit"
    image, note = image_to_rgb(Image.fromarray(np.array([[0, 7, 200]], np.uint16)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 7, 200]
    assert note == "values up to 200 read as 8-bit"


def test_wide_integers_and_floats_are_stretched():
    image, note = image_to_rgb(Image.fromarray(np.array([[-100, 0, 100]], np.int32)), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert "stretched" in note
    assert pixels(Image.fromarray(np.array([[0, 32896, 65535]], np.int32))) == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))) == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert pixels(Image.fromarray(np.array([[0, 60, 200]], np.float32))) == [(0,) * 3, (60,) * 3, (200,) * 3]
    assert pixels(Image.fromarray(np.array([[1000, 1500, 2000]], np.float32))) == [(0,) * 3, (128,) * 3, (255,) * 3]


def test_float_picture_with_nan_is_refused():
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
        (np.zeros((3, 50, 60), np.uint8), "numpy.moveaxis"),
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
