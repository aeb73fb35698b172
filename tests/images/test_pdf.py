import random
import re

import numpy as np
import pytest
from PIL import Image

from qzoom.errors import ConfigError, ImageError
from qzoom.images.limits import ImageLimits
from qzoom.images.load import load_image, load_pictures
from qzoom.images.pdf import parse_pages
from tests.pdfs import locked, of_pictures, pdf

SEVERAL = pdf([f"page {i + 1}" for i in range(5)])


def ink(picture):
    """Share of pixels that are not white."""
    return float((np.asarray(picture.image.convert("L")) < 250).mean())


def refusal(data, limits=None, pages=""):
    with pytest.raises(ImageError) as caught:
        load_pictures(data, limits, pages)
    text = str(caught.value)
    assert text.startswith("Cannot read the picture bytes: ")
    assert re.fullmatch(r"[^\n]+\.", text)
    return text


def test_pages_are_drawn_as_a_person_sees_them():
    pictures = load_pictures(SEVERAL)
    assert [picture.page.number for picture in pictures] == [1, 2, 3, 4, 5]
    assert {picture.size_px for picture in pictures} == {(834, 556)}  # 300 x 200 points at 200 dots per inch
    assert {(picture.format, picture.page.pages, picture.page.dpi) for picture in pictures} == {("PDF", 5, 200)}
    assert all(0.005 < ink(picture) < 0.1 for picture in pictures)
    digits = [np.asarray(picture.image) for picture in pictures]
    assert not np.array_equal(digits[0], digits[1])
    assert pictures[0].notes == ("all 5 pages of the PDF as drawn at 200 dots per inch; text layers are not read",)
    assert all(picture.notes == () for picture in pictures[1:])


def test_chosen_pages():
    picture = load_image(SEVERAL)
    assert (picture.page.number, picture.page.pages) == (1, 5)
    assert picture.notes[0].startswith("1 of 5 pages")
    pictures = load_pictures(SEVERAL, pages="4-5, 1,4")
    assert [picture.page.number for picture in pictures] == [4, 5, 1]
    assert load_pictures([SEVERAL, Image.new("RGB", (9, 9))], pages="2-")[-1].page is None
    assert len(parse_pages("1-5000000", 9_999_999, 100)) == 101
    with pytest.raises(ConfigError, match="can be chosen of a PDF only, but there is none; leave them out"):
        load_pictures(Image.new("RGB", (9, 9)), pages="1")
    with pytest.raises(ConfigError, match="pages must be a text"):
        load_pictures(SEVERAL, pages=[1, 2])


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        ("9", "The PDF has 5 pages, so there is no page 9; choose from 1 to 5."),
        ("0", "The PDF has 5 pages, so there is no page 0; choose from 1 to 5."),
        ("3-99", "The PDF has 5 pages, so there is no page 99; choose from 1 to 5."),
        ("5-2", "The range '5-2' ends before it begins; write 2-5."),
        ("one", "'one' names no pages; write numbers and ranges, such as 1-5,9."),
        ("1,,2", "'1,,2' names no pages; write numbers and ranges, such as 1-5,9."),
        ("1-2-3", "'1-2-3' names no pages; write numbers and ranges, such as 1-5,9."),
    ],
)
def test_wrong_pages(pages, sentence):
    with pytest.raises(ConfigError) as caught:
        load_pictures(SEVERAL, pages=pages)
    assert str(caught.value) == sentence


def test_limits_are_checked_before_drawing():
    assert "5 pages, and more than the limit of 3 would be read; choose some of them, such as pages 1-3" in refusal(
        SEVERAL, ImageLimits(max_pages=3)
    )
    assert len(load_pictures(SEVERAL, ImageLimits(max_pages=3), "2-4")) == 3
    many = refusal(pdf(["x"] * 10_000))
    assert "it has 10000 pages, and more than the limit of 100" in many
    huge = refusal(pdf(["a", "b"], size=(14400, 14400)), pages="2")
    assert "at 49 dots per inch only" in huge
    assert "page 2, has 200 x 200 inches" in huge
    with pytest.raises(ImageError, match="a strip longer than 200 times its width"):
        load_pictures(pdf(["a"], size=(14000, 10)))


def test_pages_share_the_pixels_and_scans_keep_their_places():
    pictures = load_pictures(SEVERAL, ImageLimits(max_pixels=1_000_000))
    assert pictures[0].page.dpi == 131
    assert 950_000 < sum(p.size_px[0] * p.size_px[1] for p in pictures) < 1_000_000
    scan = Image.new("RGB", (400, 200), "white")
    scan.paste((200, 30, 40), (300, 20, 380, 60))
    picture = load_pictures(of_pictures([scan], dpi=200))[0]
    assert picture.size_px == (400, 200)
    assert np.abs(np.array(picture.image.getpixel((340, 40))) - (200, 30, 40)).max() < 8
    assert picture.image.getpixel((200, 100)) == (255, 255, 255)
    assert picture.page.points((300, 20, 380, 60)) == (108.0, 7.2, 136.8, 21.6)


def test_time_is_bounded():
    # a pattern of hundreds of thousands of strokes
    strokes = b"".join(b"%d 0 m %d 2000 l S\n0 %d m 2000 %d l S\n" % (i, 2000 - i, i, 2000 - i) for i in range(2000))
    body = strokes * 40
    slow = pdf(["a"], size=(2000, 2000), extra=[b"<</Length %d>>stream\n%s\nendstream" % (len(body), body)])
    slow = slow.replace(b"/Contents 11 0 R", b"/Contents 12 0 R")
    assert "takes longer than the limit of 0.3 s" in refusal(slow, ImageLimits(max_seconds=0.3))


def test_password_and_no_pages():
    assert "it is protected by a password; print it into a new PDF without one" in refusal(locked())
    assert "without pages" in refusal(pdf([])) or "damaged" in refusal(pdf([]))


@pytest.mark.parametrize("where", ["catalog", "page"])
def test_scripts_are_not_run(where):
    action = "<</S/JavaScript/JS(app.alert\\(1\\))>>"
    data = pdf(["a"], **{where: f"/OpenAction {action}" if where == "catalog" else f"/AA<</O {action}>>"})
    assert load_pictures(data)[0].notes[1] == "scripts in the PDF are not run"


def test_filled_forms_and_hidden_layers():
    look = b"<</Type/XObject/Subtype/Form/BBox[0 0 100 30]/Length 30>>stream\n0 0 0 rg 0 0 100 30 re f      \nendstream"
    field = "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(b)/Rect[20 20 120 50]/F 4/P 10 0 R/AP<</N 13 0 R>>>>"
    form = pdf([""], catalog="/AcroForm<</Fields[12 0 R]>>", page="/Annots[12 0 R]", extra=[field, look])
    picture = load_pictures(form)[0]
    assert picture.image.convert("L").getpixel((194, 458)) < 140  # the middle of the field
    config = "/D<</ON[{}]/OFF[{}]>>"
    group = "<</Type/OCG/Name(layer)>>"
    content = b"/OC /L BDC 0 0 300 200 re f EMC"
    stream = b"<</Length %d>>stream\n%s\nendstream" % (len(content), content)
    for state, full in ((config.format("12 0 R", ""), True), (config.format("", "12 0 R"), False)):
        data = pdf(["a"], catalog=f"/OCProperties<</OCGs[12 0 R]{state}>>", extra=[group, stream])
        data = data.replace(b"/Contents 11 0 R", b"/Contents 13 0 R")
        data = data.replace(b"/Resources<<", b"/Resources<</Properties<</L 12 0 R>>")
        assert (ink(load_pictures(data)[0]) > 0.9) == full


def test_broken_files_are_one_sentence():
    draw = random.Random(5)
    good = [SEVERAL, pdf(["a", "b"], packed=True), of_pictures([Image.effect_noise((60, 40), 50)])]
    read, sentences = 0, []
    for i in range(12):
        data = bytearray(good[i % 3])
        if i % 4 == 0:
            data = data[: draw.randrange(20, len(data))]
        else:
            for _ in range(draw.choice([3, 30, 300])):
                data[draw.randrange(8, len(data))] = draw.randrange(256)
        try:
            read += all(picture.page for picture in load_pictures(bytes(data), ImageLimits(max_seconds=20)))
        except ImageError as error:
            sentences.append(str(error))
    assert 0 < read < 12
    assert all(re.fullmatch(r"Cannot read [^\n]+\.", sentence) for sentence in sentences)


def test_the_drawing_process_is_bounded_and_gone(monkeypatch):
    import subprocess

    children, popen = [], subprocess.Popen

    def remember(*args, **options):
        children.append(popen(*args, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    load_pictures(SEVERAL)
    refusal(b"%PDF-1.4 nothing")
    assert len(children) == 2
    assert all(child.poll() is not None for child in children)


def test_without_the_library(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pypdfium2" else find(name, *a))
    assert "it is a PDF, and pypdfium2 is not installed; install qzoom[pdf], or save pages as PNG" in refusal(SEVERAL)
