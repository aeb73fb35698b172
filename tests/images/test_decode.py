import io
import random
import struct
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.decode import decode_bytes
from qzoom.images.limits import ImageLimits

from .conftest import encode, png, png_chunk

LIMITS = ImageLimits()
FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "TIFF": "TIFF", "GIF": "GIF", "BMP": "BMP"}
FORMATS |= {"AVIF": "AVIF", "HEIF": "HEIF"}
pillow_heif.register_heif_opener()  # so that tests can write HEIC; reading does not need it


def decode(data):
    return decode_bytes(data, "the picture bytes", LIMITS)


def refusal(data):
    with pytest.raises(ImageError) as caught:
        decode(data)
    text = str(caught.value)
    assert text.startswith("Cannot read the picture bytes: ")
    assert "\n" not in text
    return text


def colour(x, y, data):
    return decode(data)[0].getpixel((x, y))


@pytest.mark.parametrize("pil_name", FORMATS)
def test_formats(pil_name):
    image, name, notes = decode(encode(Image.new("RGB", (40, 30), (200, 10, 20)), pil_name))
    assert (image.mode, image.size, name, notes) == ("RGB", (40, 30), FORMATS[pil_name], ())
    assert np.abs(np.array(image.getpixel((20, 15))) - (200, 10, 20)).max() <= 2


@pytest.mark.parametrize("pil_name", FORMATS)
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_cut_files(pil_name, share):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    data = encode(Image.fromarray(pixels), pil_name)
    assert "damaged or cut off" in refusal(data[: int(share * len(data))])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("pil_name", FORMATS)
def test_hostile_bytes_give_a_picture_or_one_sentence(pil_name):
    draw = random.Random(3)
    data = encode(Image.new("RGB", (33, 21), (200, 10, 20)), pil_name)
    outcomes = set()
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(12, len(changed))] = draw.randrange(256)
        try:
            outcomes.add(decode(bytes(changed))[0].mode)
        except ImageError as error:
            outcomes.add(str(error)[:30])
    assert outcomes == {"RGB", "Cannot read the picture bytes:"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"just some text", "not a picture of a known format (JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF or BMP)"),
        (b"%PDF-1.7 rest", "render the page to PNG"),
        (b"<svg xmlns='x'></svg>", "SVG"),
        (b"\xef\xbb\xbf <?xml version='1.0'?>\n<!-- c -->\n<svg></svg>", "render it to PNG"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x00\x00\x00\x20ftypheic", "damaged or cut off"),
        (b"\x00\x00\x00\x20ftypavif", "damaged or cut off"),
        (b"\x00\x00\x00\x20ftypisom", "it is a video"),
        (b"\xff\x0a rest", "it is JPEG XL"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "it is JPEG XL"),
        (b"PK\x03\x04rest", "ZIP"),
        (b"\x89PN", "cut off"),
        (b"\x00\x00\x01\x00\x01\x00", "icon"),
        (b"P6 2 2 255 " + bytes(12), "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "it is PostScript"),
        (b"8BPS\x00\x01", "it is a Photoshop file"),
        (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "it is JPEG 2000"),
        (b"\x80\x04\x95cos\nsystem\n", "not a picture of a known format"),
    ],
)
def test_other_files(data, words):
    assert words in refusal(data)


@pytest.mark.parametrize("pil_name", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_bombs_are_refused_from_the_header(pil_name):
    if pil_name == "PNG":
        data = png(30_000, 30_000, 8, 2, [bytes(50_000)])
    elif pil_name == "WEBP":
        data = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
        data[21:25] = (int.from_bytes(data[21:25], "little") & ~0xFFFFFFF | 16382 | 16382 << 14).to_bytes(4, "little")
    elif pil_name == "TIFF":
        data = bytearray(encode(Image.new("L", (16, 16)), "TIFF"))
        first = int.from_bytes(data[4:8], "little")
        for at in range(first + 2, first + 26, 12):
            if struct.unpack_from("<H", data, at)[0] in (256, 257):
                struct.pack_into("<HHII", data, at, struct.unpack_from("<H", data, at)[0], 4, 1, 30_000)
    else:
        data = bytearray(encode(Image.new("L", (16, 16)), pil_name))
        at, code = {"GIF": (6, "<HH"), "BMP": (18, "<II")}[pil_name]
        struct.pack_into(code, data, at, 30_000, 30_000)
    tracemalloc.start()
    text = refusal(bytes(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "megapixels" in text
    assert peak < 5_000_000


def test_strips_and_specks():
    assert "too small" in refusal(encode(Image.new("L", (1, 1)), "PNG"))
    assert "1 x 60000 px" in refusal(encode(Image.new("L", (1, 60_000)), "PNG"))
    assert "strip" in refusal(encode(Image.new("L", (2, 402)), "PNG"))


def test_a_text_bomb_in_a_png_is_left_out_and_never_unpacked():
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))
    tracemalloc.start()
    notes = decode(png(8, 8, 8, 0, [bytes(8)] * 8, text))[2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert notes == ("metadata that are damaged or too large were left out",)
    assert peak < 10_000_000


def test_pillows_own_warning_stays_inside(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = encode(Image.new("L", (9, 9)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(data)[0].size == (9, 9)


@pytest.mark.parametrize("pil_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [
        (1, (48, 32), (4, 4)), (2, (48, 32), (44, 4)), (3, (48, 32), (44, 28)), (4, (48, 32), (4, 28)),
        (5, (32, 48), (4, 4)), (6, (32, 48), (28, 4)), (7, (32, 48), (28, 44)), (8, (32, 48), (4, 44)),
    ],
)  # fmt: skip
def test_exif_rotation_comes_first(pil_name, orientation, size, red):
    image = Image.new("RGB", (48, 32), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if pil_name == "JPEG" else {"lossless": True} if pil_name == "WEBP" else {}
    out, _, _ = decode(encode(image, pil_name, exif=exif, **options))
    assert out.size == size
    corners = [(4, 4), (size[0] - 4, 4), (4, size[1] - 4), (size[0] - 4, size[1] - 4)]
    assert [c for c in corners if out.getpixel(c)[0] > 200] == [red]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_does_not_spoil_the_picture(four_corners):
    data = encode(four_corners, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert colour(0, 0, data) == (255, 0, 0)


def test_sixteen_bits_and_transparency():
    data = png(4, 2, 16, 0, [struct.pack(">4H", 0, 257, 32896, 65535)] * 2)
    assert [colour(x, 0, data)[0] for x in range(4)] == [0, 1, 128, 255]
    data = png(4, 2, 16, 0, [struct.pack(">4H", 0, 257, 32896, 65535)] * 2, png_chunk(b"tRNS", struct.pack(">H", 257)))
    assert [colour(x, 0, data)[0] for x in range(4)] == [0, 255, 128, 255]
    data = png(2, 2, 16, 2, [struct.pack(">6H", 65535, 32768, 256, 0, 0, 0)] * 2)
    assert colour(0, 0, data) == (255, 128, 1)
    data = encode(Image.fromarray(np.array([[0, 20_000, 65_535]] * 3, np.uint16)), "TIFF")
    assert [colour(x, 0, data)[0] for x in range(3)] == [0, 78, 255]
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 8))
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True), encode(image, "TIFF")):
        assert colour(1, 1, data) == (255, 255, 255)
        assert colour(6, 1, data) == (0, 0, 255)
    gif = Image.new("P", (8, 8), 0)
    gif.putpalette([255, 0, 0, 0, 0, 255])
    gif.paste(1, (4, 0, 8, 8))
    data = encode(gif, "GIF", transparency=0)
    assert (colour(1, 1, data), colour(6, 1, data)) == ((255, 255, 255), (0, 0, 255))


def test_cmyk_one_bit_and_palette_files():
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    red = colour(8, 8, data)
    assert red[0] > 250
    assert max(red[1:]) < 5
    tiff = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF")
    assert colour(8, 8, tiff) == (0, 255, 255)
    assert colour(1, 1, encode(Image.new("1", (4, 4), 1), "TIFF")) == (255, 255, 255)
    image = Image.new("P", (4, 4), 2)
    image.putpalette([0, 0, 0, 1, 1, 1, 10, 20, 30])
    for name in ("PNG", "BMP", "GIF", "TIFF"):
        assert colour(1, 1, encode(image, name)) == (10, 20, 30)


def test_first_page_and_its_note():
    pages = [Image.new("RGB", (9, 7), c) for c in ("red", "green", "blue")]
    for name, kind in (("TIFF", "pages"), ("GIF", "frames"), ("WEBP", "frames"), ("PNG", "frames")):
        options = {"lossless": True} if name == "WEBP" else {}
        image, _, notes = decode(encode(pages[0], name, save_all=True, append_images=pages[1:], **options))
        assert image.getpixel((3, 3)) == (255, 0, 0)
        assert notes == (f"first of 3 {kind}",)


def test_threads_do_not_disturb_each_other():
    datas = [encode(Image.new("RGB", (300, 200), (i * 10, 0, 0)), "PNG") for i in range(8)]
    found = [None] * 64

    def work(k):
        found[k] = colour(5, 5, datas[k % 8])[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [k % 8 * 10 for k in range(64)]


def test_global_settings_stay():
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    decode(encode(Image.new("L", (9, 9)), "PNG"))
    refusal(b"BM" + bytes(60))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_large_but_allowed():
    """A 90 megapixel picture is above Pillow's warning and below our limit."""
    data = encode(Image.new("1", (9_500, 9_500), 1), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, _, _ = decode_bytes(data, "x", LIMITS)
    assert image.size == (9_500, 9_500)
    assert io.BytesIO(data).getbuffer().nbytes < 2_000_000


@pytest.mark.parametrize("pil_name", ["AVIF", "HEIF"])
def test_phone_pictures_are_upright(pil_name, four_corners):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    large = four_corners.resize((400, 200), Image.Resampling.NEAREST)
    image, _, _ = decode(encode(large, pil_name, exif=exif.tobytes(), quality=95))
    assert image.size == (200, 400)
    assert np.abs(np.array(image.getpixel((150, 50))) - (255, 0, 0)).max() < 40  # red was the left end of the top row


def test_heic_without_its_library(monkeypatch):
    import sys

    data = encode(Image.new("RGB", (40, 30)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "it is HEIC, and pillow-heif is not installed; install qzoom[heic], or save it as PNG or JPEG" in refusal(
        data
    )
    assert "cut off" in refusal(encode(Image.new("RGB", (40, 30)), "AVIF")[:60])
