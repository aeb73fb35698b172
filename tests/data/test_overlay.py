import io

import numpy as np
import pytest
from PIL import Image

from qzoom.data.overlay import ShareSchedule, choose_style, clause, draw, has_box, line_width_px, with_margin
from qzoom.errors import ConfigError, DataError, ImageError

GREY = (128, 128, 128)


def _plain(colour=GREY, size=(400, 300)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_rectangle_is_around_the_margined_box_and_changes_nothing_else():
    picture = _plain()
    out = np.asarray(draw(picture, (100, 100, 200, 160), tokens=100))
    line = line_width_px((400, 300), 100)
    assert line == round((400 * 300 / 100) ** 0.5 / 6) == 6
    changed = (out != GREY).any(axis=2)
    expected = np.zeros((300, 400), dtype=bool)
    expected[97 - 6 : 163 + 6, 95 - 6 : 205 + 6] = True
    expected[97:163, 95:205] = False
    assert np.array_equal(changed, expected)
    assert np.asarray(picture).min() == np.asarray(picture).max() == 128
    assert line_width_px((4000, 2000), 288) == 28
    assert line_width_px((4000, 2000), 1152) == 14
    assert line_width_px((50, 50), 1024) == 2


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 220, 0), (0, 64, 255), (255, 230, 0), (255, 255, 255), (0, 0, 0)])
def test_colour_differs_from_what_it_covers(colour):
    out = np.asarray(draw(_plain(colour), (100, 100, 200, 160)), dtype=int)
    drawn = out[(out != colour).any(axis=2)]
    assert len(np.unique(drawn, axis=0)) == 1
    assert np.abs(drawn[0] - colour).max() >= 150


def test_boxes_keep_their_inside_and_colours_follow_the_place():
    picture = _plain((255, 0, 0))
    picture.paste((0, 0, 0), (0, 0, 150, 300))
    left, right = draw(picture, (40, 40, 80, 80)), draw(picture, (250, 100, 300, 150))
    on_black = np.asarray(left)[35:45, 20:40].reshape(-1, 3)
    on_red = np.asarray(right)[90:100, 245:250].reshape(-1, 3)
    assert (on_black.max(axis=0) > 200).any()
    assert (on_red != (255, 0, 0)).any()
    out = np.asarray(draw(_plain(), (100, 100, 200, 160), "ellipse"))
    assert (out[100:160, 100:200] == 128).all()
    assert (out != 128).any()
    out = np.asarray(draw(_plain(), (100, 100, 200, 160), "dim"))
    assert (out[97:163, 95:205] == 128).all()
    out = out.copy()
    out[97:163, 95:205] = 45
    assert (out == 45).all()


@pytest.mark.parametrize("style", ["none", "text"])
def test_none_and_text_leave_the_pixels(style):
    assert np.array_equal(np.asarray(draw(_plain(), (1, 1, 9, 9), style)), np.asarray(_plain()))


def test_whole_picture_and_edges_stay_inside():
    for box in ((0, 0, 400, 300), (390, 290, 500, 400), (-20, -20, 5, 5)):
        out = draw(_plain(), box)
        assert out.size == (400, 300)
        assert (np.asarray(out) != 128).any()


def test_palette_and_exif_are_read_as_a_person_sees_them():
    palette = _plain((10, 200, 10)).convert("P")
    out = np.asarray(draw(palette, (100, 100, 200, 160)))
    assert np.abs(out[0, 0].astype(int) - (10, 200, 10)).max() <= 12
    turned = Image.new("RGB", (60, 40), GREY)
    exif = turned.getexif()
    exif[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "PNG", exif=exif)
    seen = draw(data.getvalue(), (5, 45, 30, 58))
    assert seen.size == (40, 60)
    assert (np.asarray(seen)[40:60, 0:40] != 128).any()
    assert (np.asarray(seen)[:30] == 128).all()


@pytest.mark.parametrize("box", [(10, 10, 10, 20), (500, 10, 600, 20), (0, 0, float("nan"), 4), (1, 2, 3), "box"])
def test_bad_boxes_are_refused(box):
    with pytest.raises(DataError):
        draw(_plain(), box)


def test_clauses_margins_and_bad_styles():
    with pytest.raises(ConfigError, match="rectangle"):
        draw(_plain(), (1, 1, 5, 5), "box")
    with pytest.raises(ImageError):
        draw(b"no picture", (1, 1, 5, 5))
    assert clause("none", (0, 0, 1, 1), (10, 10)) == ""
    text = clause("text", (100, 100, 200, 200), (1000, 500), margin=0.0)
    assert text == "Look only at the region from (100, 200) to (200, 400)."
    assert "rectangle" in clause("rectangle", (0, 0, 1, 1), (10, 10))
    assert with_margin((0, 0, 100, 50), (110, 51)) == (0, 0, 105, 51)
    assert with_margin((0, 0, 100, 50), (110, 90), 0.5) == (0, 0, 110, 75)


def test_the_draw_is_decided_by_item_epoch_and_weight():
    assert [ShareSchedule().share(p) for p in (-1, 0, 0.5, 1, 2)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert ShareSchedule(0.8, 0.2, "cosine", 0.5).share(0.25) == pytest.approx(0.5)
    assert ShareSchedule(0.8, 0.2, "cosine", 0.5).share(0.5) == pytest.approx(0.2)
    assert ShareSchedule(0.7, 0.0, "constant").share(0.9) == 0.7
    assert ShareSchedule(until=0.0).share(0.0) == 0.0
    for bad in ({"shape": "steps"}, {"first": 1.5}, {"until": True}):
        with pytest.raises(ConfigError):
            ShareSchedule(**bad)
    ids = [f"{i:020x}" for i in range(2000)]
    shown = [has_box(i, 0, 0.3) for i in ids]
    assert shown == [has_box(i, 0, 0.3) for i in ids]
    assert 0.26 < sum(shown) / len(ids) < 0.34
    assert all(has_box(i, 0, 0.6) for i, on in zip(ids, shown, strict=True) if on)
    assert shown != [has_box(i, 1, 0.3) for i in ids]
    assert not any(has_box(i, 0, 0.0) for i in ids)
    assert all(has_box(i, 0, 1.0) for i in ids)
    chosen = [choose_style(f"{i:020x}", 0, {"rectangle": 3, "none": 0, "dim": 1}) for i in range(2000)]
    assert set(chosen) == {"rectangle", "dim"}
    assert 0.7 < chosen.count("rectangle") / 2000 < 0.8
    for bad in ({"box": 1.0}, {"dim": 0.0}, {"dim": 2.0, "text": -1.0}):
        with pytest.raises(ConfigError):
            choose_style("a", 0, bad)
