import pytest

from qzoom.errors import DataError
from qzoom.evaluation.comparable import check_coverage, check_gaps
from qzoom.evaluation.zoom_views import GapSettings

RECEIPTS = {"task": "questions", "split": "dev", "sha256": "a" * 64}
SCENES = {"task": "scenes", "seed": 0}


def about(data=RECEIPTS, model="tiny", **settings):
    """What stands beside the figures of a run."""
    return data | {"model": model} | GapSettings(**settings).to_dict()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_visual_tokens": 576}, "max_visual_tokens is 1024 here and 576 there"),
        ({"max_new_tokens": 16}, "max_new_tokens is 128 here and 16 there"),
        ({"crop_scale": "fit"}, "crop_scale is 2.0 here and 'fit' there"),
        ({"crop_margin": 0.5, "crop_min_px": 1}, "crop_margin is 0.1 here and 0.5 there, crop_min_px is 56 here and 1"),
        ({"places": "all"}, "places is 'auto' here and 'all' there"),
        ({"box_style": "dim"}, "box_style is 'rectangle' here and 'dim' there"),
        ({"zoom": "always"}, "zoom_mode is 'auto' here and 'always' there"),
        ({"data": RECEIPTS | {"split": "test", "sha256": "b" * 64}}, "split is 'dev' here and 'test' there, sha256 is"),
        ({"data": SCENES}, "task is 'questions' here and 'scenes' there"),
    ],
)
def test_other_settings_and_other_data_are_named(changes, said):
    with pytest.raises(DataError, match="The runs cannot be compared: ") as error:
        check_gaps(about(), about(**changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("this", "other"),
    [
        (about(), about(model="student")),
        (about(views=("full", "zoom")), about(crop_margin=0.9, box_style="dim", places="all")),
        (about(views=("full", "boxed")), about(crop_scale=1.0, zoom="always")),
        (about(crop_scale="shipped", views=("full", "region")), about(crop_scale="shipped", crop_margin=0.9)),
        (about(RECEIPTS | {"task": "receipts"}), about()),
        (about(SCENES), about(SCENES | {"seed": 40})),
    ],
)
def test_what_decides_no_common_view_may_differ(this, other):
    assert check_gaps(this, other) == check_gaps(other, this) == ""


def test_what_is_not_stored_is_said_and_not_compared():
    old = {"model": "tiny", "task": "questions", "views": ["full", "region"], "max_visual_tokens": 1024}
    said = check_gaps(about(), old)
    assert said == (
        "Not stored with both runs, so not compared: split, sha256, max_new_tokens, crop_scale, crop_margin, "
        "crop_min_px, places."
    )
    with pytest.raises(DataError, match="max_visual_tokens is 576 here and 1024 there"):
        check_gaps(about(max_visual_tokens=576), old)


def test_coverage_compares_data_and_limit():
    this = RECEIPTS | {"model": "tiny", "max_visual_tokens": 144}
    assert check_coverage(this, this | {"model": "student", "n": 4}, RECEIPTS) == ""
    with pytest.raises(DataError, match="max_visual_tokens is 144 here and 576 there"):
        check_coverage(this, this | {"max_visual_tokens": 576}, RECEIPTS)
    with pytest.raises(DataError, match=r"sha256 is 'aaa.* here and 'ccc.* there; ask one of them again"):
        check_coverage(this, this | {"sha256": "c" * 64}, RECEIPTS)
    said = check_coverage(this, this | {"max_visual_tokens": None}, RECEIPTS)
    assert said == "Not stored with both runs, so not compared: max_visual_tokens."
