import pytest

from qzoom.data.samples import AnswerRow
from qzoom.errors import DataError
from qzoom.evaluation.score import score
from qzoom.evaluation.tables import score_lines
from tests.evaluation.samples import row

ROWS = [
    row("RM 33.90", zoom=[(0, 0, 100, 100)], boxes=((10, 10, 20, 20), (0, 150, 9, 160)), easy=False),  # right, a hit
    row("33.96", zoom=[(0, 0, 50, 40), (0, 20, 50, 60)], boxes=((40, 40, 60, 50),), easy=False),  # 0.8, a miss
    row("12/01/19", "12-01-19", field="date", zoom=[(0, 0, 10, 20)], seconds=1.5),  # 0.75, place unknown
    row("Acme", "ACME", field="company", boxes=((1, 1, 5, 5),), easy=True),  # right without a zoom
    row(answer="ACME", field="company", error="ValueError: it broke", boxes=((1, 1, 5, 5),), easy=True),
]


def test_figures():
    found = score(ROWS, ("total", "date", "company"))
    assert found.n == 5
    assert list(found.exact_match) == ["total", "date", "company", "all"]
    assert found.exact_match == {"total": 0.5, "date": 0.0, "company": 0.5, "all": 0.4}
    assert found.anls == pytest.approx((1 - 2 / 8 + 1 - 1 / 5 + 1 + 0) / 5 + 0.625 / 5)  # "RM 33.90": 3 edits of 8
    assert found.zoomed == pytest.approx(3 / 5)
    assert found.hit_rate == 0.5
    assert found.box_area == pytest.approx((0.5 + 0.15 + 0.01) / 3, abs=1e-6)
    assert found.visual_tokens == (110 + 120 + 110 + 100) / 4
    assert found.seconds == pytest.approx(3.5 / 5)
    assert found.seconds_total == pytest.approx(3.5)
    assert found.errors == 1
    assert found.difficulty == {
        "easy": {"n": 2, "exact_match": 0.5, "zoomed": 0.0},
        "hard": {"n": 2, "exact_match": 0.5, "zoomed": 1.0},
    }


@pytest.mark.parametrize(
    ("predictions", "unread", "strict"),
    [(["**B**", "\\boxed{B}", "(B)", "B. blue"], 0, 1.0), (["**B**", "I cannot tell", "", "A or B"], 3, 0.25)],
)
def test_unread_answers_to_choices_are_counted(predictions, unread, strict):
    rows = [
        row(text, "B", metric="choice_vstar", choices=("red", "blue"), picture=str(i))
        for i, text in enumerate(predictions)
    ]
    failed = row("", "B", metric="choice_vstar", choices=("red", "blue"), error="damaged")
    figures = score(rows)
    assert (figures.unread, figures.strict["all"]) == (unread, strict)
    assert figures.to_dict()["unread"] == unread
    assert any("name no option" in line for line in score_lines(figures)) is (unread > 0)
    assert score([*rows, failed, row()]).unread == unread


def test_shares_of_nothing_are_none():
    found = score([row(easy=None)], ("total", "date"))
    assert found.exact_match == {"total": 1.0, "date": None, "all": 1.0}
    assert (found.zoomed, found.hit_rate, found.box_area) == (0.0, None, None)
    assert "difficulty" not in found.to_dict()
    empty = score([])
    assert (empty.n, empty.exact_match, empty.seconds) == (0, {"all": None}, None)
    assert score([row()]).unread is None
    assert "unread" not in score([row()]).to_dict()
    assert score([row(answer="", error="no")]).exact_match["all"] == 0.0


@pytest.mark.parametrize("made", ROWS)
def test_rows_survive_the_file(made):
    assert AnswerRow.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("drop", ["boxes", "gate", "picture", "answer"])
def test_rows_of_something_else(drop):
    values = row().to_dict()
    del values[drop]
    with pytest.raises(DataError):
        AnswerRow.from_dict(values)
