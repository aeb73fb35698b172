"""A rerun after the question file was changed gives what a new run gives, and computes no more than it must."""

import json

import pytest

from qzoom.distill.recipe import DatasetRecipe
from qzoom.distill.run import run_recipe
from qzoom.settings import from_mapping
from tests.distill.data import code_of, make_pictures, recipe_values
from tests.llm.stub import Stub, serve, text_of

pq = pytest.importorskip("pyarrow.parquet")
FILES = ("dataset/train.parquet", "dataset/README.md")
LATER = ("ask", "validate", "answer", "vote")
OTHER_BOX = [290, 200, 350, 240]


def recipe_of(*pictures, **changes):
    return from_mapping(DatasetRecipe, recipe_values(*pictures, **changes), "test")


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rerun(recipe, tmp_path, change, path):
    """Run, change the question file and run again; gives the second run's counts of what it computed, without zeros,
    and its rows by question."""
    run_recipe(recipe, tmp_path / "out")
    edit(path, change)
    report = run_recipe(recipe, tmp_path / "out")
    run_recipe(recipe, tmp_path / "new")
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    rows = pq.read_table(tmp_path / "out/dataset/train.parquet").to_pylist()
    computed = {step: count for step, count in report.computed.items() if count}
    return computed, {row["extra_info"]["question"]: (row["answer"], row["bbox"]) for row in rows}


def test_a_corrected_answer_arrives(tmp_path):
    path = make_pictures(tmp_path / "in", 3)
    computed, rows = rerun(recipe_of(path), tmp_path, lambda lines: lines[2].update(answer="CORRECTED7"), path)
    assert computed == dict.fromkeys(LATER, 1)
    assert rows["Which code stands at place 0 of sheet 1?"] == ("CORRECTED7", [40, 30, 100, 70])
    assert {answer for answer, _ in rows.values()} == {
        "CORRECTED7", *(code_of(p, n) for p in range(3) for n in range(2) if (p, n) != (1, 0)),
    }  # fmt: skip


def test_a_corrected_box_arrives(tmp_path):
    path = make_pictures(tmp_path / "in", 3)
    computed, rows = rerun(recipe_of(path), tmp_path, lambda lines: lines[2].update(boxes=[OTHER_BOX]), path)
    assert computed == dict.fromkeys(("propose", "crop", *LATER), 1)
    assert rows["Which code stands at place 0 of sheet 1?"] == (code_of(1, 0), OTHER_BOX)
    assert rows["Which code stands at place 1 of sheet 1?"] == (code_of(1, 1), [160, 90, 220, 130])
    assert len(rows) == 6


def test_an_added_question_arrives_beside_the_old_ones(tmp_path):
    path = make_pictures(tmp_path / "in", 3)
    new = {"id": "n", "image": "1.png", "question": "Which word stands below?", "answer": "EXTRA", "boxes": [OTHER_BOX]}
    computed, rows = rerun(recipe_of(path), tmp_path, lambda lines: lines.append(new), path)
    assert computed == dict.fromkeys(("propose", "crop", *LATER), 1)
    assert rows[new["question"]] == ("EXTRA", OTHER_BOX)
    assert len(rows) == 7


def test_an_added_question_about_a_known_place_arrives(tmp_path):
    path = make_pictures(tmp_path / "in", 2)
    new = {"id": "n", "image": "1.png", "question": "Which digit is printed first?", "answer": "1"}
    computed, rows = rerun(
        recipe_of(path), tmp_path, lambda lines: lines.append(new | {"boxes": lines[2]["boxes"]}), path
    )
    assert computed == dict.fromkeys(LATER, 1)
    assert rows[new["question"]] == ("1", [40, 30, 100, 70])
    assert len(rows) == 5


def test_a_box_of_a_tile_that_is_corrected_moves_its_question(tmp_path):
    """Tiles are proposed whatever is known, so only the questions inside them differ."""
    path = make_pictures(tmp_path / "in", 1)
    recipe = recipe_of(path, propose={"by": ["grid"], "grid": {"columns": 2, "rows": 2}, "select": {"max_share": 0.5}})
    computed, rows = rerun(recipe, tmp_path, lambda lines: lines[0].update(boxes=[OTHER_BOX]), path)
    assert computed == {"ask": 2, "validate": 1, "answer": 1, "vote": 1}
    assert rows["Which code stands at place 0 of sheet 0?"] == (code_of(0, 0), [200, 150, 400, 300])


def test_wrong_options_follow_the_other_answers_of_their_picture(tmp_path):
    path = make_pictures(tmp_path / "in", 2, places=3)
    roles = recipe_values()["roles"] | {"distractor_writer": {"by": "rule"}}
    recipe = recipe_of(path, roles=roles, choices={"none_share": 0.0, "negatives": 0.0, "required": True})
    computed, _ = rerun(recipe, tmp_path, lambda lines: lines[0].update(answer="CORRECTED7"), path)
    assert computed == dict.fromkeys(LATER, 1) | {"choices": 3}
    options = {
        option
        for row in pq.read_table(tmp_path / "out/dataset/train.parquet").to_pylist()
        for option in row["choices"]
        if row["answer"] != "CORRECTED7"
    }
    assert "CORRECTED7" in options
    assert code_of(0, 0) not in options


def test_questions_that_decide_nothing_leave_keys_and_paid_calls_alone(tmp_path):
    path = make_pictures(tmp_path / "in", 2)

    def reply(body, before):
        place, sheet = text_of(body).split("place ")[1].split("?")[0].split(" of sheet ")
        return f"<answer>K{sheet.strip()}{place.strip()}Z</answer>"

    stub = Stub(reply)
    with serve(stub) as url:
        members = [{"by": "endpoint", "name": n, "endpoints": [{"url": url, "model": n}]} for n in ("a", "b")]
        recipe = recipe_of(path, roles={"teachers": members})
        computed, rows = rerun(recipe, tmp_path, lambda lines: lines[0].update(answer="K00Z."), path)
        assert max(stub.asked.values()) == 2  # by the rerun's folder and by the new one
        assert sum(stub.asked.values()) == 2 * 4 * 2 * 4
    assert computed == dict.fromkeys(LATER, 1)
    assert rows["Which code stands at place 0 of sheet 0?"][0] == "K00Z"
    keys = [json.loads(line)["key"] for line in (tmp_path / "new/steps/crop.jsonl").read_text().splitlines()[1:]]
    assert [len(key) for key in keys] == [20] * 4


def test_without_known_questions_keys_are_the_ids(tmp_path):
    run_recipe(recipe_of("documents:0:2", "scenes:0:1"), tmp_path / "out")
    for step in ("propose", "ask", "vote"):
        lines = (tmp_path / "out/steps" / f"{step}.jsonl").read_text().splitlines()[1:]
        assert {len(json.loads(line)["key"]) for line in lines} == {20}


def test_equal_pictures_with_other_questions_do_not_mix(tmp_path):
    one, two = make_pictures(tmp_path / "one", 4), make_pictures(tmp_path / "two", 4)
    edit(two, lambda lines: [line.update(answer="WRONG1") for line in lines])
    recipe = recipe_of(one, two, workers=8)
    report = run_recipe(recipe, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/dataset/train.parquet").to_pylist()
    assert {row["answer"] for row in rows} == {code_of(p, n) for p in range(4) for n in range(2)}
    assert report.stats.duplicates == 4
