import pytest
from PIL import Image

from qzoom.data.crop import CropSettings, crop_box, crop_scale, cut
from qzoom.errors import ConfigError

SIZE_PX = (1000, 600)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((400, 200, 500, 300), (390, 190, 510, 310)), ((0, 0, 100, 100), (0, 0, 110, 110)),
        ((500, 300, 510, 304), (477, 274, 533, 330)), ((995, 598, 1000, 600), (944, 544, 1000, 600)),
        ((-50, 100, 50, 200), (0, 90, 56, 210)), ((0, 0, 1000, 600), (0, 0, 1000, 600)),
    ],
)  # fmt: skip
def test_margin_and_least_size_stay_on_the_picture(box, expected):
    assert crop_box(box, SIZE_PX, CropSettings(margin=0.1, min_width_px=56, min_height_px=56)) == expected


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"scale": 3.5}, 3.5), ({"max_pixels": 10_000}, 1.0), ({"max_tokens": 4, "token_px": 25}, 0.5)],
)
def test_scale_follows_the_tightest_limit(settings, scale):
    assert crop_scale((0, 0, 100, 100), CropSettings(**settings)) == scale


def test_pixels_are_those_of_the_box():
    image = Image.new("RGB", (100, 80), "white")
    image.paste("red", (20, 10, 40, 30))
    crop = cut(image, (20, 10, 40, 30), 2.0)
    assert crop.size == (40, 40)
    assert crop.getcolors() == [(1600, (255, 0, 0))]
    assert cut(image, (0, 0, 1, 1), 0.1).size == (1, 1)
    with pytest.raises(ConfigError, match="scale"):
        CropSettings(scale=0)
    assert crop_box((10, 10, 20, 20), (40, 30), CropSettings()) == (0, 0, 40, 30)
