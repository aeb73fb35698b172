"""The gap's figures from rows written by hand."""

import pytest

from qzoom.errors import DataError
from qzoom.evaluation.zoomgap import compare_gaps, enters_gap, is_negative, measure_gap
from tests.evaluation.samples import row

BOX = ((10, 10, 20, 20),)  # 100 px of 100 x 200: 0.5 %


def asked(picture, index, said, *, answer="x", boxes=BOX, field="code", view="full", **values):
    name = f"{picture}#{index}" if view in ("region", "boxed") else picture
    number = 0 if view in ("region", "boxed") else index
    return row(said, answer, picture=name, index=number, boxes=boxes, field=field, **values)


def views():
    """Three placed questions, a negative, one without a place."""
    full = [
        asked("a", 0, "x"),
        asked("a", 1, "y"),
        asked("b", 0, "y", boxes=((0, 0, 100, 100),), field="date"),
        asked("b", 1, "none", answer="none", boxes=()),
        asked("b", 2, "x", boxes=()),
    ]
    region = [
        asked("a", 0, "x", view="region"),
        asked("a", 1, "x", view="region"),
        asked("b", 0, "x", view="region", error="broken"),
    ]
    boxed = [asked("a", 0, "x", view="boxed"), asked("a", 1, "y", view="boxed"), asked("b", 0, "x", view="boxed")]
    zoom = [
        asked("a", 0, "x", zoom=[(0, 0, 5, 5)]),
        asked("a", 1, "x"),
        asked("b", 0, "x"),
        asked("b", 1, "a dog", answer="none", boxes=()),
        asked("b", 2, "x", boxes=()),
    ]
    return {"full": full, "region": region, "boxed": boxed, "zoom": zoom}


def test_figures_by_hand():
    found = measure_gap(views())
    assert (found.n, found.pictures, found.dropped, found.without_place) == (3, 2, 0, 1)
    third = pytest.approx(1 / 3)
    assert found.accuracy == {"full": third, "region": pytest.approx(2 / 3), "boxed": pytest.approx(2 / 3), "zoom": 1.0}
    assert found.gap == third
    # two pictures drawn twice: a twice gives +1/2, b twice 0, one of each +1/3
    assert found.gap_interval == (0.0, 0.5)
    assert found.zoom_gain[0] == pytest.approx(2 / 3)
    assert found.errors == {"full": 0, "region": 1, "boxed": 0, "zoom": 0}
    assert found.negatives == {"n": 1, "full": 1.0, "zoom": 0.0}
    assert found.visual_tokens["zoom"] == pytest.approx((110 + 100 + 100) / 3)
    assert {name: group["n"] for name, group in found.per_kind.items()} == {"code": 2, "date": 1}
    assert found.per_kind["code"]["gap"] == 0.5
    assert found.per_kind["date"]["gap_interval"] == [0.0, 0.0]
    assert {name: group["n"] for name, group in found.per_area.items()} == {"0.3-1%": 2, ">=10%": 1}


def test_plain_json():
    written = measure_gap(views()).to_dict()
    for key in ("n", "full", "region", "boxed", "zoom", "gap", "gap_interval", "per_kind", "per_area", "negatives"):
        assert key in written
    assert written["gap_interval"] == [0.0, 0.5]


def test_views_that_were_not_asked():
    rows = views()
    found = measure_gap({"full": rows["full"]})
    assert (found.gap, found.gap_interval, found.zoom_gain) == (None, None, None)
    assert found.to_dict()["region"] is None
    assert found.per_kind["code"] == {"n": 2, "full": 0.5}


def test_a_stopped_run_counts_whole_pictures():
    rows = views()
    rows["region"] = rows["region"][:1]
    rows["boxed"] = rows["boxed"][:2]
    found = measure_gap(rows)
    assert (found.n, found.dropped, found.pictures) == (0, 2, 0)
    assert (found.accuracy["full"], found.gap) == (None, None)


@pytest.mark.parametrize(
    ("answer", "values", "negative"),
    [
        ("none", {}, True),
        ("None of these.", {}, True),
        ("nonesuch", {}, False),
        ("B", {"choices": ("red", "none of these")}, True),
        ("A", {"choices": ("red", "none of these")}, False),
        ("no", {"negative": True}, True),
        ("no", {}, False),
    ],
)
def test_negatives(answer, values, negative):
    question = row(answer, answer, boxes=BOX, **values)
    assert is_negative(question) is negative
    assert enters_gap(question) is not negative


def test_an_unreadable_row_counts_as_wrong():
    lost = row(answer="", field="unusable", error="Row 3: broken", boxes=())
    assert enters_gap(lost)
    again = row(answer="", field="unusable", error="Row 3: broken", boxes=(), picture="a#0")
    found = measure_gap({"full": [lost], "region": [again]})
    assert (found.n, found.accuracy, found.errors) == (1, {"full": 0.0, "region": 0.0}, {"full": 1, "region": 1})


def test_yes_is_counted():
    rows = [
        row("yes", "no", index=0, boxes=(), negative=True),
        row("Yes.", "yes", index=1, boxes=BOX),
        row("no", "no", index=2, boxes=()),
    ]
    found = measure_gap({"full": rows})
    assert found.yes_no == {"n": 3, "truly_yes": pytest.approx(1 / 3), "said_yes": {"full": pytest.approx(2 / 3)}}
    assert found.negatives == {"n": 1, "full": 0.0}


def test_before_and_after():
    before, after = views(), views()
    after["full"][1] = asked("a", 1, "x")
    found = compare_gaps(after, before)
    assert (found["n"], found["dropped"]) == (3, 0)
    assert (found["full"]["this"], found["full"]["other"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["full"]["difference"] == pytest.approx(1 / 3)
    assert found["full"]["interval"] == [0.0, 0.5]
    assert found["gap"]["this"] == pytest.approx(0.0)
    assert found["gap"]["other"] == pytest.approx(1 / 3)
    assert found["gap"]["closed"] == pytest.approx(1.0)
    assert found["negatives"]["difference"] == 0.0


def test_only_common_questions_are_compared():
    before, after = views(), views()
    after["full"] = after["full"][:2]
    found = compare_gaps(after, before)
    assert (found["n"], found["dropped"], found["negatives"]) == (2, 3, None)


def test_runs_over_other_data():
    rows, other = views(), views()
    other["full"][0] = asked("a", 0, "x", answer="z")
    with pytest.raises(DataError, match="same data"):
        compare_gaps(rows, other)
    with pytest.raises(DataError, match="no question in common"):
        compare_gaps(rows, {"full": [asked("q", 0, "x")]})
