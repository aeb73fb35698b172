"""Which places the region shows."""

from qzoom.evaluation.zoom_views import places_shown

SMALL, LARGE = (0, 0, 10, 10), (50, 50, 90, 60)


def test_one_place_holds_most_answers():
    assert places_shown("date", [SMALL, LARGE], "auto") == (LARGE,)
    assert places_shown("date", [SMALL, LARGE], "all") == (SMALL, LARGE)


def test_counts_take_all():
    assert places_shown("count", [SMALL, LARGE], "auto") == (SMALL, LARGE)
    assert places_shown("side", [SMALL, LARGE], "auto") == (SMALL, LARGE)
    assert places_shown("count", [SMALL, LARGE], "one") == (LARGE,)


def test_no_place():
    assert places_shown("count", [], "auto") == ()
    assert places_shown("date", [], "one") == ()
