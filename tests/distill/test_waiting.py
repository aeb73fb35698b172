"""An endpoint that fails for long leaves items waiting, not refused; one that spends the budget ends the run."""

import pytest

from qzoom.distill.recipe import recipe_from_values
from qzoom.distill.run import run_recipe
from qzoom.errors import StopRunError
from tests.distill.data import make_pictures, recipe_values
from tests.llm.stub import Stub, serve, text_of

FILES = ("dataset/train.parquet", "dataset/README.md")


def recipe_at(url, questions, **calls):
    members = [{"by": "endpoint", "name": name, "endpoints": [{"url": url, "model": name}]} for name in ("a", "b")]
    roles = {"teachers": members, "calls": {"retries": 1, "backoff_s": 0.001, **calls}}
    return recipe_from_values(recipe_values(questions, roles=roles), "test")


def good(body, before):
    place, sheet = text_of(body).split("place ")[1].split("?")[0].split(" of sheet ")
    return f"<answer>K{sheet.strip()}{place.strip()}Z</answer>"


def test_a_rerun_finishes_what_had_to_wait(tmp_path):
    questions = make_pictures(tmp_path / "in", 3)
    failing = [True]

    def answer(body, before):
        if failing[0] and "of sheet 1?" in text_of(body):
            return 500, {}
        return good(body, before)

    with serve(Stub(answer)) as url:
        first = run_recipe(recipe_at(url, questions), tmp_path / "out")
        assert (first.rows["train"], sum(first.totals.waiting.values())) == (4, 2)
        assert first.totals.refused == {}
        failing[0] = False
        again = run_recipe(recipe_at(url, questions), tmp_path / "out")
        assert (again.rows["train"], sum(again.totals.waiting.values())) == (6, 0)
        assert again.computed["answer"] == 2
        run_recipe(recipe_at(url, questions), tmp_path / "calm")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_a_spent_budget_ends_the_run_and_more_budget_goes_on(tmp_path):
    questions = make_pictures(tmp_path / "in", 3)
    stub = Stub(good)
    with serve(stub) as url:
        with pytest.raises(StopRunError, match="budget"):
            run_recipe(recipe_at(url, questions, budget_requests=20), tmp_path / "out")
        assert sum(stub.asked.values()) == 20
        report = run_recipe(recipe_at(url, questions, budget_requests=100), tmp_path / "out")
        assert report.rows["train"] == 6
        assert sum(stub.asked.values()) == 3 * 2 * 2 * 4
        card = (tmp_path / "out/dataset/README.md").read_text()
    assert "teacher a:" in card
    assert "Look closely and think in a few sentences." in card
    assert url not in card
