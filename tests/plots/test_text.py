import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qzoom.plots.text import clean, draw_text, paragraph, text_width, wrap


def ink(text, **options):
    image = Image.new("L", (600, 60))
    draw_text(ImageDraw.Draw(image), options.pop("at", (10, 5)), text, 30, options.pop("colour", 255), **options)
    columns = np.flatnonzero(np.asarray(image).any(axis=0))
    return (int(columns[0]), int(columns[-1])) if len(columns) else None


def test_texts_are_clean_lines():
    assert clean("  a\tb\x00c\r\nd\u2028e\xa0f ") == "a b c \nd e f"
    assert clean("\ud800x") == "\ufffdx"
    assert clean("a\u202eb\u200dc") == "ab\u200dc"
    assert clean("x" * 5000) == "x" * 4000 + "…"
    assert wrap("What is the total?", 1000, 30) == ["What is the total?"]
    assert wrap("", 100, 30) == [""]
    assert wrap("one\ntwo\n\nthree", 500, 30, max_lines=5) == ["one", "two", "three"]
    text = r"$\frac{1}{2}$ <b> _x_ & %"
    assert wrap(text, 2000, 30) == [text]
    assert text_width("$x$", 30) == pytest.approx(2 * text_width("$", 30) + text_width("x", 30), abs=1)


def test_lines_fit_and_keep_every_word():
    text = "the quick brown fox jumps over the lazy dog and runs away"
    lines = wrap(text, 300, 30, max_lines=20)
    assert len(lines) > 2
    assert all(text_width(line, 30) <= 300 for line in lines)
    assert " ".join(lines) == text
    lines = wrap("word " * 500, 300, 30, max_lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(text_width(line, 30) <= 300 for line in lines)
    lines = wrap("x" * 200, 300, 30, max_lines=50)
    assert "".join(lines) == "x" * 200
    assert all(text_width(line, 30) <= 300 for line in lines)


def test_anchors():
    width = text_width("total", 30)
    left, right = ink("total", at=(300, 5))
    assert abs(left - 300) <= 3
    assert abs(right - 300 - width) <= 4
    assert abs(ink("total", at=(300, 5), anchor="r")[1] - 300) <= 4
    left, right = ink("total", at=(300, 5), anchor="m")
    assert abs((left + right) / 2 - 300) <= 4


@pytest.mark.parametrize(
    "text",
    ["商店的名称", "مرحبا بالعالم", "שלום", "🎉🧾", "∑∫√", "\U0010ffff", "\ud83d", "नमस्ते", "Ünï·çødé €", "e\u0301"],
)
def test_any_unicode_is_drawn(text):
    assert ink(text) is not None
    assert paragraph(text * 40, 300, 30, max_lines=2).size[0] == 300


def test_planes_and_paragraphs_can_be_measured():
    for start in range(0, sys.maxunicode, 0x1357):
        assert text_width(clean(chr(start) + "a"), 20) > 0
    one, two = paragraph("a", 400, 30), paragraph("a\nb", 400, 30)
    assert one.size[0] == two.size[0] == 400
    assert two.size[1] > one.size[1] + 30
    glyphs = paragraph("gjpqy ÅÉ", 400, 30).getchannel("A")
    assert glyphs.getbbox()[1] >= 0
    assert glyphs.getbbox()[3] <= glyphs.size[1] - 1
