import io

import pytest
from PIL import Image

from qzoom.images.decode import frame_note

from .conftest import encode


def stack(count, format_name, **options):
    frames = [Image.new("RGB", (6, 5), (40 * i, 255 - 40 * i, 9)) for i in range(count)]
    return encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_pages_and_frames_are_counted(count):
    assert frame_note(stack(count, "TIFF"), "TIFF", 1) == f"first of {count} pages"
    assert frame_note(stack(count, "TIFF", big_tiff=True), "TIFF", 1) == f"first of {count} pages"
    assert frame_note(stack(count, "GIF"), "GIF", 1) == f"first of {count} frames"
    assert frame_note(b"", "WebP", count) == f"first of {count} frames"


@pytest.mark.parametrize("format_name", ["TIFF", "GIF", "PNG", "WebP"])
def test_single_pictures_have_no_note(format_name):
    assert frame_note(stack(1, format_name), format_name, 1) == ""


def test_odd_chains_and_counts_end():
    frames = [Image.new("P", (6, 5), i) for i in range(3)]
    for i, frame in enumerate(frames):
        frame.putpalette([i * 40, 5, 9] * 256)
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"c" * 700)
    assert frame_note(data, "GIF", 1) == f"first of {Image.open(io.BytesIO(data)).n_frames} frames"
    data = bytearray(stack(1, "TIFF"))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    after = first + 2 + 12 * entries
    data[after : after + 4] = first.to_bytes(4, "little")
    assert frame_note(bytes(data), "TIFF", 1) == ""
    one = b"\x2c" + bytes(8) + b"\x00" + b"\x02" + b"\x00"
    data = b"GIF89a" + bytes(7) + one * 200_000
    assert frame_note(data, "GIF", 1) == "first of more than 10000 frames"


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_cut_files_do_not_raise(cut):
    for format_name in ("GIF", "TIFF"):
        assert isinstance(frame_note(stack(3, format_name)[:cut], format_name, 1), str)
