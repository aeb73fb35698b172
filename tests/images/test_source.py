import base64
import io
import os
from pathlib import Path

import pytest

from qzoom.errors import ImageError
from qzoom.images.limits import ImageLimits
from qzoom.images.load import read_data_url, read_file_object, read_path, shown

LIMITS = ImageLimits(max_bytes=1000)


def refusal(call, *args):
    with pytest.raises(ImageError) as caught:
        call(*args, LIMITS)
    text = str(caught.value)
    assert text.startswith("Cannot read ")
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_paths(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 1000)
    assert read_path(path, LIMITS) == b"x" * 1000
    assert read_path(str(path), LIMITS) == b"x" * 1000
    (tmp_path / "empty.png").touch()
    (tmp_path / "big.png").write_bytes(b"x" * 1001)
    assert "no such file" in refusal(read_path, tmp_path / "none.png")
    assert "none.png" in refusal(read_path, tmp_path / "none.png")
    assert "is a folder" in refusal(read_path, tmp_path)
    assert "empty (0 bytes)" in refusal(read_path, tmp_path / "empty.png")
    assert "larger than the limit" in refusal(read_path, tmp_path / "big.png")
    assert "not a valid path" in refusal(read_path, "a\0b")
    assert "too long" in refusal(read_path, "x" * 5000)


def test_path_without_permission(tmp_path):
    path = tmp_path / "locked.png"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    assert "permission denied" in refusal(read_path, path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_endless_device_is_cut_at_the_limit():
    assert "larger than the limit" in refusal(read_path, "/dev/zero")


def test_shown_is_short_quoted_and_on_one_line():
    assert shown("a b.png") == "'a b.png'"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 5000)) == 100
    assert shown("\udcff.png").isascii()


class Dribble(io.RawIOBase):
    """A raw stream that gives three bytes at a time and remembers how many it gave."""

    def __init__(self, size):
        self.left, self.given = size, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        count = min(3, self.left, len(buffer))
        buffer[:count] = b"x" * count
        self.left -= count
        self.given += count
        return count


def test_file_objects(tmp_path):
    file = io.BytesIO(b"skip" + b"y" * 500)
    file.seek(4)
    assert read_file_object(file, LIMITS) == (b"y" * 500, "the open file")
    assert read_file_object(Dribble(1000), LIMITS)[0] == b"x" * 1000
    stream = Dribble(10**9)
    assert "larger than the limit" in refusal(read_file_object, stream)
    assert stream.given == 1001
    closed = io.BytesIO(b"x")
    closed.close()
    assert "it is closed" in refusal(read_file_object, closed)
    assert "binary mode" in refusal(read_file_object, io.StringIO("text"))
    assert "no bytes" in refusal(read_file_object, io.BytesIO(b""))
    (tmp_path / "a.png").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "a.png").open(encoding="utf-8") as text:
        assert "a.png" in refusal(read_file_object, text)
    with (tmp_path / "b.png").open("wb") as write_only:
        assert "reading" in refusal(read_file_object, write_only)


@pytest.mark.parametrize(
    "change",
    [
        str,
        lambda s: s.rstrip("="),
        lambda s: s.replace("+", "%2B"),
        lambda s: s + "\n",
        lambda s: s.replace("+", "-").replace("/", "_"),  # RFC 4648, section 5
        lambda s: s.replace(";", "; ", 1),
        lambda s: s.replace(";", ';charset=utf-8;name="a,b;c.png";', 1),
        lambda s: s.replace("image/png", "", 1).replace("base64", "BASE64", 1),
    ],
)
def test_data_url(change):
    data = bytes(range(256)) + b"\xfb\xef\xbe"
    assert read_data_url(change("data:image/png;base64," + base64.b64encode(data).decode()), LIMITS) == data


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:", "no comma"), ("data:,", "not marked as base64"), ("data:image/png;base64", "no comma"),
        ("data:image/png,abc", "not marked as base64"),
        ("data:image/png,abc;base64,AAAA", "not marked as base64"),
        ("data:image/png;base64,", "empty"), ("data:image/png;base64,%%%", "broken"),
        ("data:image/png;base64,ab!d", "broken"), ("data:image/png;base64,äöü", "broken"),
        ("data:image/png;base64," + "A" * 1400, "larger than the limit"),
    ],
)  # fmt: skip
def test_data_url_refusals(url, words):
    assert words in refusal(read_data_url, url)
