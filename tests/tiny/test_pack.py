import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qzoom.errors import ConfigError, DataError
from tiny.draw_pages import draw_page, pack_header
from tiny.pack import Pack, PackedLine, PackedObject, PackedQuestion, PackHeader, Page, build_pack

HEADER = PackHeader("test", "1-abc", 7, 5)


def _page(number):
    pixels = np.random.default_rng(number).integers(0, 256, (40 + number, 61, 3) if number % 2 else (33, 50), np.uint8)
    chars = np.array([[1.25, 2.0, 9.5, 12.0], [9.5, 2.0, 18.0, 12.0]], dtype=np.float32)
    lines = (PackedLine("A1", (1, 2, 18, 12), chars), PackedLine("NO PLACES", (0, 0, 30, 9)))
    question = PackedQuestion("date", "When?", "A1", ((1, 2, 18, 12),), True, ((0, 0, 2),))
    objects = (PackedObject("red", "star", (1, 2, 3, 4)),) if number % 2 else None
    return Page(pixels, "test", f"page-{number}", lines, (question,), objects, capitals=number == 3)


def _same(one, two):
    assert np.array_equal(one.pixels, two.pixels)
    assert np.array_equal(one.lines[0].char_boxes_px, two.lines[0].char_boxes_px)
    assert [(line.text, line.box) for line in one.lines] == [(line.text, line.box) for line in two.lines]
    assert (one.questions, one.objects, one.capitals, one.name) == (two.questions, two.objects, two.capitals, two.name)


def test_a_pack_gives_back_what_went_in(tmp_path):
    build_pack(tmp_path / "p", HEADER, _page)
    pack = Pack(tmp_path / "p", HEADER)
    assert len(pack) == 5
    for number in range(5):
        _same(pack[number], _page(number))


@pytest.mark.parametrize("cut", ["index line", "pixels", "half a page too much"])
def test_an_interrupted_pack_goes_on_to_the_same_bytes(tmp_path, cut):
    build_pack(tmp_path / "whole", HEADER, _page)
    broken = iter(range(3))

    def stops(number):
        if next(broken, None) is None:
            raise KeyboardInterrupt
        return _page(number)

    with pytest.raises(KeyboardInterrupt):
        build_pack(tmp_path / "part", HEADER, stops)
    index, pixels = tmp_path / "part.jsonl", tmp_path / "part.pixels"
    if cut == "index line":
        index.write_bytes(index.read_bytes()[:-20])
    elif cut == "half a page too much":
        pixels.write_bytes(pixels.read_bytes() + b"x" * 1000)
    with pytest.raises(DataError, match=r"of 5 pages; run the same"):
        Pack(tmp_path / "part", HEADER)
    build_pack(tmp_path / "part", HEADER, _page)
    assert pixels.read_bytes() == (tmp_path / "whole.pixels").read_bytes()
    assert index.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_mismatches_are_named(tmp_path):
    with pytest.raises(DataError, match="no pack at"):
        Pack(tmp_path / "p")
    build_pack(tmp_path / "p", HEADER, _page)
    other = PackHeader("test", "2-abc", 7, 5)
    with pytest.raises(DataError, match="has renderer 1-abc, not 2-abc"):
        Pack(tmp_path / "p", other)
    with pytest.raises(DataError, match="has seed 7, not 8"):
        build_pack(tmp_path / "p", PackHeader("test", "1-abc", 8, 5), _page)
    pixels = tmp_path / "p.pixels"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(DataError, match="is truncated"):
        Pack(tmp_path / "p", HEADER)


def test_a_full_disk_is_one_sentence_and_the_pack_goes_on(tmp_path):
    def full(number):
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return _page(number)

    with pytest.raises(DataError, match="disk is full"):
        build_pack(tmp_path / "p", HEADER, full)
    build_pack(tmp_path / "p", HEADER, _page)
    _same(Pack(tmp_path / "p", HEADER)[2], _page(2))


def test_a_pack_without_its_pixels_is_drawn_again(tmp_path):
    build_pack(tmp_path / "p", HEADER, _page)
    pixels, index = tmp_path / "p.pixels", tmp_path / "p.jsonl"
    whole = pixels.read_bytes(), index.read_bytes()
    pixels.unlink()
    with pytest.raises(DataError, match=r"lacks p\.pixels; run the same `pack` command"):
        Pack(tmp_path / "p", HEADER)
    build_pack(tmp_path / "p", HEADER, _page)
    assert (pixels.read_bytes(), index.read_bytes()) == whole
    index.write_bytes(b"".join(whole[1].splitlines(keepends=True)[:3]))
    pixels.unlink()
    build_pack(tmp_path / "p", HEADER, _page)
    assert (pixels.read_bytes(), index.read_bytes()) == whole


def test_a_second_process_is_refused_while_one_packs(tmp_path):
    refused = []

    def page(number):
        with pytest.raises(ConfigError, match=r"Another process is writing to .*p\.jsonl") as caught:
            build_pack(tmp_path / "p", HEADER, _page)
        refused.append(caught.value)
        return _page(number)

    build_pack(tmp_path / "p", HEADER, page)
    assert len(refused) == 5
    _same(Pack(tmp_path / "p", HEADER)[4], _page(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [*lines, lines[-1]], "names 6 pages instead of 5"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "page page-2 begins at byte"),
        (lambda lines: [*lines[:5], {"name": "page-4"}], "cannot be read"),
    ],
    ids=["too many pages", "out of order", "no place"],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, words):
    build_pack(tmp_path / "p", HEADER, _page)
    index = tmp_path / "p.jsonl"
    lines = change([json.loads(line) for line in index.read_text().splitlines()])
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for use in (Pack, lambda path, header: build_pack(path, header, _page)):
        with pytest.raises(DataError, match=words):
            use(tmp_path / "p", HEADER)


_SLOW = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.tiny.test_pack import HEADER, _page
from tiny.pack import build_pack
def page(number):
    if number == 4:
        print("busy", flush=True)
        time.sleep(600)
    return _page(number)
build_pack(Path(sys.argv[1]), HEADER, page)
"""


def test_kill_9_while_packing(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(tmp_path / "p"), root], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"busy\n"
    process.kill()
    process.communicate()
    assert 3 <= (tmp_path / "p.jsonl").read_bytes().count(b"\n") < 6
    build_pack(tmp_path / "p", HEADER, _page)
    build_pack(tmp_path / "whole", HEADER, _page)
    assert (tmp_path / "p.pixels").read_bytes() == (tmp_path / "whole.pixels").read_bytes()


@pytest.mark.parametrize("kind", ["sheets", "documents", "scenes", "sheets_held_out"])
def test_drawn_pages_depend_on_their_number_alone(kind):
    first, second = draw_page(kind, 1, 3), draw_page(kind, 1, 3)
    assert np.array_equal(first.pixels, second.pixels)
    assert [line.text for line in first.lines] == [line.text for line in second.lines]
    assert draw_page(kind, 1, 4).name != first.name
    assert pack_header(kind, 1, 9).count == 9
    height, width = first.pixels.shape[:2]
    inside = [line for line in first.lines if line.box[2] <= width + 2 and line.box[3] <= height + 2]
    assert len(inside) >= 0.9 * len(first.lines)
