from collections import Counter

import pytest

from qzoom.distill.recipe import DatasetRecipe
from qzoom.distill.run import run_recipe
from qzoom.settings import from_mapping
from tests.distill.data import make_pictures, recipe_values
from tests.llm.stub import Stub, serve, text_of

pytest.importorskip("ray")
FILES = ("dataset/train.parquet", "dataset/README.md")


def reply(body, before):
    place, sheet = text_of(body).split("place ")[1].split("?")[0].split(" of sheet ")
    return f"<answer>K{sheet.strip()}{place.strip()}Z</answer>"


@pytest.mark.slow
def test_ray_equals_in_process_resumes_and_shares_the_kept_calls(tmp_path):
    stub = Stub(reply)
    with serve(stub) as url:
        members = [
            {"by": "endpoint", "name": name, "endpoints": [{"url": url, "model": name}]} for name in ("one", "two")
        ]
        values = recipe_values(make_pictures(tmp_path / "in", 6), roles={"teachers": members})
        here = from_mapping(DatasetRecipe, values, "test")
        there = from_mapping(DatasetRecipe, values | {"engine": "ray", "ray": {"actors": 2, "threads": 2}}, "test")
        calm = run_recipe(here, tmp_path / "here")
        stub.asked = Counter()
        run_recipe(here, tmp_path / "there", limit=2)
        report = run_recipe(there, tmp_path / "there")
        again = run_recipe(there, tmp_path / "there")
        assert set(stub.asked.values()) == {1}
        assert sum(stub.asked.values()) == 6 * 2 * 2 * 4
    assert report.computed["answer"] == 8
    assert set(again.computed.values()) == {0}
    assert report.stats.to_dict() == again.stats.to_dict() == calm.stats.to_dict()
    for name in FILES:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert sum(cost["requests"] for cost in report.cost) == 4 * 2 * 2 * 4
