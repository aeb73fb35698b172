"""Declared views, and complaints about wrong ones."""

import pytest

from qzoom.errors import ConfigError
from qzoom.evaluation.zoom_views import GapSettings

WRONG = {
    "a view": ({"views": ("full", "crop")}, "views must be among"),
    "no full view": ({"views": ("region",)}, "start with 'full'"),
    "order": ({"views": ("full", "zoom", "region")}, "follow the order"),
    "one token": ({"max_visual_tokens": 1}, "from 2"),
    "a word as scale": ({"crop_scale": "twice"}, "crop_scale"),
    "no scale": ({"crop_scale": 0}, "crop_scale"),
    "endless": ({"crop_scale": float("inf")}, "crop_scale"),
    "negative margin": ({"crop_margin": -0.1}, "crop_margin"),
    "no pixel": ({"crop_min_px": 0}, "crop_min_px"),
    "text style": ({"box_style": "text"}, "rectangle, ellipse, dim"),
    "places": ({"places": "some"}, "places"),
    "never": ({"zoom": "never"}, "'auto' or 'always'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong(kind):
    values, said = WRONG[kind]
    with pytest.raises(ConfigError, match=said):
        GapSettings(**values)


def test_written_down():
    written = GapSettings(("full", "region"), 288, "fit").to_dict()
    assert (written["views"], written["crop_scale"], written["zoom_mode"]) == (["full", "region"], "fit", "auto")
    assert "zoom" not in written
