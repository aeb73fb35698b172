import pytest

from qzoom.errors import ConfigError, ImageError
from qzoom.images.limits import ImageLimits, check_bytes, check_size


@pytest.mark.parametrize("size", [(2, 2), (2, 400), (400, 2), (10_000, 10_000), (20_000, 100)])
def test_allowed_sizes(size):
    assert check_size(size, "'x'", ImageLimits()) is None


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1, 1), "too small"), ((1, 60_000), "too small"), ((10_001, 10_000), "100 megapixels"),
        ((2, 401), "200 times"), ((401, 2), "200 times"),
    ],
)  # fmt: skip
def test_refused_sizes_name_source_and_size(size, words):
    with pytest.raises(ImageError, match=words) as caught:
        check_size(size, "'x.png'", ImageLimits())
    assert "'x.png'" in str(caught.value)
    assert f"{size[0]} x {size[1]} px" in str(caught.value)


def test_own_limits():
    limits = ImageLimits(max_pixels=100, max_bytes=10, max_aspect=3, min_side_px=4)
    check_size((10, 10), "x", limits)
    for size in ((11, 10), (3, 5), (4, 13)):
        with pytest.raises(ImageError):
            check_size(size, "x", limits)
    check_bytes(10, "x", limits)
    for count in (0, 11):
        with pytest.raises(ImageError):
            check_bytes(count, "x", limits)


@pytest.mark.parametrize("name", ["max_pixels", "max_bytes", "max_aspect", "min_side_px"])
@pytest.mark.parametrize("value", [0, -1, True, "5", float("nan")])
def test_limits_are_validated(name, value):
    with pytest.raises(ConfigError, match=name):
        ImageLimits(**{name: value})
