import pytest
from PIL import Image

from qzoom.errors import ConfigError, DataError
from qzoom.evaluation.zoom_views import GapSettings, crop, enlargement, region_of, target_boxes

WRONG = {
    "a view": ({"views": ("full", "crop")}, "must be one of full, region, boxed, zoom, not 'crop'"),
    "no full view": ({"views": ("region",)}, "start with 'full'"),
    "order": ({"views": ("full", "zoom", "region")}, "follow the order"),
    "one token": ({"max_visual_tokens": 1}, "of at least 2"),
    "a word as scale": ({"crop_scale": "twice"}, "crop_scale"),
    "no scale": ({"crop_scale": 0}, "crop_scale"),
    "endless": ({"crop_scale": float("inf")}, "crop_scale"),
    "negative margin": ({"crop_margin": -0.1}, "crop_margin"),
    "no pixel": ({"crop_min_px": 0}, "crop_min_px"),
    "text style": ({"box_style": "text"}, "rectangle, ellipse, dim"),
    "places": ({"places": "some"}, "places"),
    "never": ({"zoom": "never"}, "one of auto, always"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong(kind):
    values, said = WRONG[kind]
    with pytest.raises(ConfigError, match=said):
        GapSettings(**values)


def test_margins_and_small_regions():
    half = GapSettings(crop_margin=0.5, crop_min_px=1)
    assert region_of([(100, 100, 120, 110)], (400, 300), GapSettings(crop_margin=0.0, crop_min_px=1)) == (
        *(100, 100, 120, 110),
    )
    assert region_of([(100, 100, 120, 110)], (400, 300), half) == (90, 95, 130, 115)
    assert region_of([(0, 0, 20, 10), (380, 290, 400, 300)], (400, 300), half) == (0, 0, 400, 300)
    grown = GapSettings(crop_margin=0.0, crop_min_px=40)
    assert region_of([(100, 100, 120, 110)], (400, 300), grown) == (90, 85, 130, 125)
    assert region_of([(0, 100, 20, 110)], (400, 300), grown) == (0, 85, 40, 125)
    assert region_of([(0, 0, 10, 10)], (30, 20), grown) == (0, 0, 30, 20)


@pytest.mark.parametrize("boxes", [(), [(10, 10, 10, 20)], [(500, 10, 520, 20)]])
def test_no_region(boxes):
    with pytest.raises(DataError):
        region_of(boxes, (400, 300), GapSettings())


def test_scales_and_crops():
    assert enlargement((50, 20), GapSettings(crop_scale=3), 32) == 3.0
    fit = GapSettings(crop_scale="fit", max_visual_tokens=100)
    assert enlargement((64, 16), fit, 32) == pytest.approx(10.0)  # 640 x 160 px are 100 cells of 32 x 32
    assert enlargement((1000, 1000), fit, 32) == 1.0
    image = Image.new("RGB", (100, 80), "white")
    image.paste("black", (20, 30, 40, 40))
    cut = crop(image, (20, 30, 40, 40), GapSettings(crop_scale=2), 32)
    assert cut.size == (40, 20)
    assert cut.getextrema() == ((0, 0),) * 3
    assert crop(image, (0, 0, 100, 80), GapSettings(crop_scale=0.1), 32).size == (10, 8)
    written = GapSettings(("full", "region"), 288, "fit").to_dict()
    assert (written["views"], written["crop_scale"], written["zoom_mode"]) == (["full", "region"], "fit", "auto")
    assert "zoom" not in written


SMALL, LARGE = (0, 0, 10, 10), (50, 50, 90, 60)


def test_target_boxes():
    assert target_boxes("date", [SMALL, LARGE], "auto") == (LARGE,)
    assert target_boxes("date", [SMALL, LARGE], "all") == (SMALL, LARGE)
    assert target_boxes("count", [SMALL, LARGE], "auto") == (SMALL, LARGE)
    assert target_boxes("side", [SMALL, LARGE], "auto") == (SMALL, LARGE)
    assert target_boxes("count", [SMALL, LARGE], "one") == (LARGE,)
    assert target_boxes("count", [], "auto") == ()
    assert target_boxes("date", [], "one") == ()
