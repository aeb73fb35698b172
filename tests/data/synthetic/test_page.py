import numpy as np

from qzoom.data.synthetic import texts
from qzoom.data.synthetic.page import HELD_OUT_SEEDS, TRAIN_SEEDS, Page, ScanStyle, TextSpan, age, font_paths, span_box


def test_characters_are_in_their_boxes_where_they_were_asked():
    page = Page(300, 80)
    page.print(20, 20, "A1 B", font_paths()[0], 30)
    grey = np.asarray(page.image)
    for char, (x0, y0, x1, y1) in zip("A1 B", page.lines[0].char_boxes_px, strict=True):
        inked = (grey[int(y0) : int(y1) + 1, round(float(x0)) : round(float(x1))] < 128).any()
        assert inked == (char != " ")
    page = Page(400, 200)
    path = font_paths()[0]
    right = page.print(300, 10, "12.50", path, 24, align="right")
    middle = page.print(200, 60, "12.50", path, 24, align="center")
    assert span_box(page.lines, TextSpan(right, 0, 5))[2] in (300, 301)
    box = span_box(page.lines, TextSpan(middle, 0, 5))
    assert abs((box[0] + box[2]) / 2 - 200) <= 1


def test_boxes_follow_stretch_and_rotation():
    page = Page(600, 400)
    page.print(380, 120, "X", font_paths()[1], 60)
    page.transform(0.9, 1.1, 3.0, 255)
    grey = np.asarray(page.image).astype(int)
    rows, columns = np.nonzero(grey < 100)
    x0, y0, x1, y1 = page.lines[0].char_boxes_px[0]
    assert x0 - 3 <= columns.mean() <= x1 + 3
    assert abs(columns.mean() - (x0 + x1) / 2) < 4
    assert abs(rows.mean() - (y0 + y1) / 2) < 4


def test_ageing_is_deterministic_and_lowers_contrast():
    page = Page(200, 100)
    page.print(10, 20, "12345", font_paths()[0], 40)
    style = ScanStyle(noise=5.0, shade=20.0, fade=0.3, erosion=0.05)
    first = age(page.image, style, np.random.default_rng(1))
    second = age(page.image, style, np.random.default_rng(1))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert np.percentile(np.asarray(first), 2) > np.percentile(np.asarray(page.image), 2) + 40


def test_amounts_and_seed_ranges():
    assert TRAIN_SEEDS.stop <= HELD_OUT_SEEDS.start
    assert texts.bare_amount("RM 12.50") == "12.50"
    assert texts.bare_amount("RM12.50") == "12.50"
    assert texts.bare_amount("$3.10") == "3.10"
    assert texts.bare_amount("RM2019") == "RM2019"
    assert texts.bare_amount("ROSE") == "ROSE"
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = texts.amount(rng)
        assert text[-3] == "."
        assert text.replace(",", "").replace(".", "").isdigit()
