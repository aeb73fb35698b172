import numpy as np
import pytest
from PIL import Image, ImageDraw

from qzoom.plots.overlay import draw_boxes, heat_overlay, rounded
from qzoom.plots.text import ACCENTS


def peak_map(rows=10, columns=10, at=(5, 5), value=0.8):
    values = np.zeros((rows, columns), np.float32)
    values[at] = value
    return values


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 4), np.float32),
        np.full((4, 4), 0.01, np.float32),
        np.zeros((0, 4), np.float32),
        np.full((4, 4), np.nan, np.float32),
    ],
)
def test_empty_maps_leave_the_page_alone(values):
    page = Image.new("RGB", (100, 80), (10, 200, 30))
    out = heat_overlay(page, values)
    assert out is not page
    assert (np.asarray(out) == np.asarray(page)).all()


@pytest.mark.parametrize("colour", [(255, 255, 255), (20, 30, 40)])
def test_the_peak_is_tinted_and_the_rest_is_not(colour):
    page = Image.new("RGB", (200, 200), colour)
    out = np.asarray(heat_overlay(page, peak_map()), np.int16)
    change = np.abs(out - np.array(colour)).sum(axis=2)
    y, x = np.unravel_index(change.argmax(), change.shape)
    assert 95 <= x <= 125
    assert 95 <= y <= 125
    assert change.max() > 60
    assert change[:60].max() == 0
    red, _, blue = out[110, 110]
    assert red > blue


def test_maps_of_any_size_and_value_look_the_same():
    page = Image.new("RGB", (300, 100), (255, 255, 255))
    out = np.asarray(heat_overlay(page, peak_map(5, 15, (1, 12))), np.int16)
    y, x = np.unravel_index((255 * 3 - out.sum(axis=2)).argmax(), out.shape[:2])
    assert 240 <= x < 260
    assert 20 <= y < 40
    page = Image.new("RGB", (100, 100), (255, 255, 255))
    low, high = (heat_overlay(page, peak_map(value=v)) for v in (0.1, 1.0))
    assert np.abs(np.asarray(low, np.int16) - np.asarray(high, np.int16)).max() <= 1
    values = peak_map()
    values[0, 0], values[9, 9] = np.nan, -np.inf
    page = Image.new("RGB", (100, 100), (255, 255, 255))
    assert (np.asarray(heat_overlay(page, values))[0, 0] == 255).all()


def test_print_keeps_its_contrast_under_the_heat():
    page = Image.new("RGB", (200, 200), (255, 255, 255))
    ImageDraw.Draw(page).line((60, 110, 160, 110), (0, 0, 0), 3)
    out = np.asarray(heat_overlay(page, np.ones((4, 4), np.float32)).convert("L"), np.int16)
    assert out[90, 110] - out[110, 110] > 100


def test_boxes_are_outlined_coloured_and_numbered():
    page = Image.new("RGB", (200, 300), (0, 0, 0))
    out, shown = draw_boxes(page, [(100, 300, 200, 400)], (400, 600), numbered=False)
    assert shown == [(50, 150, 100, 200)]
    pixels = np.asarray(out)
    assert (pixels[150:200, 50:100] == 0).all()
    assert tuple(pixels[175, 47]) == ACCENTS[0]
    assert tuple(pixels[147, 75]) == ACCENTS[0]
    assert (pixels[:140] == 0).all()
    assert (np.asarray(page) == 0).all()
    page = Image.new("RGB", (400, 400))
    boxes = [(50, 50, 150, 150), (200, 50, 300, 150), (50, 250, 150, 350)]
    plain, _ = draw_boxes(page, boxes, (400, 400), numbered=False)
    numbered, shown = draw_boxes(page, boxes, (400, 400), numbered=True)
    assert shown == boxes
    for i, (x, y, _, _) in enumerate(boxes):
        assert tuple(np.asarray(numbered)[y + 60, x - 3]) == ACCENTS[i]
        assert (np.asarray(numbered)[y + 5, x + 5] != np.asarray(plain)[y + 5, x + 5]).any()


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3999, 3999, 4000, 4000), (0, 0, 4000, 4000), (2000, 10, 2001, 3000)])
def test_tiny_and_full_boxes_stay_on_the_page(box):
    out, [(x0, y0, x1, y1)] = draw_boxes(Image.new("RGB", (100, 100)), [box], (4000, 4000), numbered=True)
    assert out.size == (100, 100)
    assert 0 <= x0 <= x1 - 12
    assert 0 <= y0 <= y1 - 12
    assert max(x1, y1) <= 100


def test_outlines_fit_thin_pages():
    out, [box] = draw_boxes(Image.new("RGB", (300, 2)), [(0, 0, 10, 10)], (30_000, 200), numbered=True)
    assert out.size == (300, 2)
    assert box[3] <= 2
    out = rounded(Image.new("RGB", (60, 40), (1, 2, 3)), 12, (200, 0, 0), 4)
    assert out.mode == "RGBA"
    assert out.getpixel((0, 0))[3] == 0
    assert out.getpixel((30, 20)) == (1, 2, 3, 255)
    assert out.getpixel((30, 1)) == (200, 0, 0, 255)
    assert rounded(Image.new("RGB", (1, 1)), 12).size == (1, 1)
