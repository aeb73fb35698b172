import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ImageError
from qzoom.images.load import ImageLimits, LoadedImage, load_image
from tests.images.asset_server import assets, reply

from .conftest import encode


@pytest.fixture
def data(four_corners):
    return encode(four_corners, "PNG")


def sources(data, tmp_path):
    path = tmp_path / "späce and $.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    upper = "DATA:image/png;BASE64," + url.partition(",")[2]
    picture = Image.open(io.BytesIO(data))
    array = np.asarray(picture)
    return [
        str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data), url, upper, picture, array
    ]  # fmt: skip


def test_every_source_gives_the_same_pixels(data, four_corners, tmp_path):
    expected = np.asarray(four_corners)
    for source in sources(data, tmp_path):
        loaded = load_image(source)
        assert (loaded.size_px, loaded.image.mode, loaded.notes) == ((4, 2), "RGB", ())
        assert (np.asarray(loaded.image) == expected).all()
        assert loaded.format == (None if isinstance(source, np.ndarray) else "PNG")


def test_open_files_and_loaded_images(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with (tmp_path / "a.png").open("rb") as file:
        loaded = load_image(file)
    assert loaded.size_px == (4, 2)
    assert load_image(loaded) is loaded
    loaded = load_image(data)
    with pytest.raises(AttributeError):
        loaded.format = "BMP"
    assert isinstance(loaded, LoadedImage)
    with pytest.raises(ImageError) as caught:
        load_image(data[:40])
    for word in ("BytesIO", "0x", "PIL", "object at"):
        assert word not in str(caught.value)


def test_sizes_copies_and_notes():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    loaded = load_image(data)
    assert loaded.size_px == loaded.image.size == (20, 40)
    lazily_opened = Image.open(io.BytesIO(data))
    assert load_image(lazily_opened).size_px == (20, 40)
    assert load_image(loaded.image).size_px == (20, 40)
    image = Image.new("RGB", (5, 5), (1, 2, 3))
    loaded = load_image(image)
    image.putpixel((0, 0), (9, 9, 9))
    assert loaded.image.getpixel((0, 0)) == (1, 2, 3)
    pages = [Image.fromarray(np.full((4, 4), v, np.uint16)) for v in (4000, 5)]
    loaded = load_image(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert loaded.notes == ("first of 2 pages", "values up to 4000 read as 12-bit")


def test_limits_are_used(data):
    for source in (data, np.zeros((2, 4), np.uint8), Image.new("L", (4, 2))):
        with pytest.raises(ImageError, match="4 x 2 px"):
            load_image(source, ImageLimits(max_pixels=7))
    with pytest.raises(ImageError, match="larger than the limit"):
        load_image(data, ImageLimits(max_bytes=len(data) - 1))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no-such-file.png", "Cannot read 'no-such-file.png': there is no such file; check the path."),
        (Path("no-such-file.png"), "no such file"), ("file://elsewhere/a.png", "another machine"),
        ("file://[x", "malformed"), ("iVBORw0KGgo" * 40, "looks like base64"),
        ("s3://bucket/a.png", "addresses of this kind are not read; download it"),
        ("iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAA=", "looks like base64"),
        ({"type": "text"}, "no bytes, path, image or image_url"),
        ({"image_url": {"detail": "low"}}, "no bytes, path, image or image_url"), ("", "path is empty"),
        (".", "is a folder"), (b"", "empty (0 bytes)"), (b"text", "not a picture of a known format"),
        ("data:image/png;base64,AAAA", "Cannot read the data URL: it is not a picture"), (None, "'NoneType'"),
        (7, "'int'"),
        ({"image": [1]}, "no bytes, path, image or image_url"), ({"base64": "!"}, "base64 data are broken"),
 (["a.png"], "'list'"), (io.StringIO("text"), "binary mode"),
        (Image.new("L", (1, 1)), "too small"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(source, words):
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_closed_and_cut_pil_images(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ImageError, match=r"a\.png.*cannot be decoded"):
        load_image(image)
    noise = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)), "PNG")
    with pytest.raises(ImageError, match="the PIL image"):
        load_image(Image.open(io.BytesIO(noise[:-2000])))


def test_sources_of_datasets_openai_and_browsers(tmp_path):
    path = tmp_path / "a b.png"
    data = encode(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG")
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (
        path.as_uri(),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": str(path)},
        {"bytes": bytearray(data)},
        {"image": io.BytesIO(data)},
        {"type": "image", "base64": url.split(",")[1]},
        {"type": "image", "base64": url},
    ):
        assert load_image(source).image.getpixel((4, 4)) == (1, 2, 3)


def test_a_web_address_is_fetched_from_public_hosts_only():
    with assets({"/p.png": reply("200 OK", b"")}) as server:
        with pytest.raises(ImageError, match=r"address"):
            load_image(f"http://127.0.0.1:{server.port}/p.png")
        assert server.asked == []


def test_blanks_in_base64_are_plus_signs_and_line_breaks_are_nothing():
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 50, 3), dtype=np.uint8))
    text = base64.b64encode(encode(noise, "JPEG", quality=95)).decode()
    assert "+" in text
    expected = np.asarray(load_image("data:image/jpeg;base64," + text).image)
    wrapped = "\r\n  ".join(text[at : at + 76] for at in range(0, len(text), 76))
    for form in (text.replace("+", " "), wrapped, text + "\n"):
        assert np.array_equal(np.asarray(load_image("data:image/jpeg;base64," + form).image), expected)


def test_tensors_and_channels_first():
    import torch

    red = np.zeros((50, 60, 3), np.uint8)
    red[..., 0] = 200
    first = np.moveaxis(red, -1, 0)
    sources = [first, torch.from_numpy(first), torch.from_numpy(red), torch.from_numpy(first / 255).to(torch.bfloat16)]
    for source in [*sources, torch.from_numpy(first / 255).requires_grad_()]:
        picture = load_image(source)
        assert picture.size_px == (60, 50)
        assert abs(picture.image.getpixel((5, 5))[0] - 200) < 2
        assert picture.image.getpixel((5, 5))[1:] == (0, 0)
    part = {"type": "image", "image": Image.fromarray(red)}  # as transformers writes it
    assert load_image(part).image.getpixel((5, 5)) == (200, 0, 0)
    for inner in (red, torch.from_numpy(first)):
        assert load_image({"type": "image", "image": inner}).image.getpixel((5, 5)) == (200, 0, 0)
    square = np.zeros((3, 40, 3), np.uint8)
    assert load_image(square).size_px == (40, 3)
    assert load_image(torch.from_numpy(square)).size_px == (3, 40)
    with pytest.raises(ImageError, match="1x3x40x3 is not that of a picture"):
        load_image(torch.from_numpy(square)[None])
    with pytest.raises(ImageError, match="the tensor: it has no values"):
        load_image(torch.zeros(3, 40, 40, device="meta"))
    with pytest.raises(ImageError, match="values are not dense"):
        load_image(torch.from_numpy(red[..., 0].copy()).to_sparse())
