import json

import pytest
import yaml
from PIL import Image

from tests.distill.data import make_pictures, recipe_values


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_values(make_pictures(tmp_path / "in", 2))))
    return path


def test_a_run_reports_every_step_and_where_the_data_is(here, recipe, tmp_path):
    said = here("distill", recipe, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == "pictures: 2 used, 0 refused, 0 twice"
    assert "vote: 4 in, 4 kept" in lines
    assert lines[-1] == f"4 train, 0 validation rows in {tmp_path / 'out/dataset'}; not compared with any benchmark"


def test_json_holds_all_counts_and_a_step_can_start_anew(here, recipe, tmp_path):
    here("distill", recipe, "-o", tmp_path / "out", "--quiet")
    said = here("distill", recipe, "-o", tmp_path / "out", "--fresh", "--step", "vote", "--json")
    values = json.loads(said.out)
    assert values["steps"]["propose"] == {"entered": 2, "kept": 4, "refused": {}}
    assert (values["computed"]["propose"], values["computed"]["vote"]) == (0, 4)
    assert (values["rows"], values["compared"]) == ({"train": 4, "validation": 0}, False)
    assert values == json.loads((tmp_path / "out/report.json").read_text())


def test_a_run_without_a_row_has_code_1(here, tmp_path):
    values = recipe_values(make_pictures(tmp_path / "in", 1), propose={"select": {"min_side_px": 299}})
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(values))
    said = here("distill", tmp_path / "none.yaml", "-o", tmp_path / "out")
    assert said.code == 1
    assert "0 train, 0 validation rows" in said.out
    assert "No row was exported" in said.err
    assert (tmp_path / "out/report.json").exists()


def test_dry_run_says_what_would_be_done_and_does_nothing(here, recipe, tmp_path):
    said = here("distill", recipe, "-o", tmp_path / "out", "--dry-run", "--engine", "ray", "--json")
    values = json.loads(said.out)
    assert (values["pictures"], values["engine"]) == (2, "ray")
    assert values["steps"][0] == "propose"
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_sentence(here, recipe, tmp_path):
    assert here("distill", tmp_path / "none.yaml").is_one_sentence
    said = here("distill", recipe, "-o", tmp_path / "out", "--fresh", "--step", "vot")
    assert said.is_one_sentence
    assert "its steps: propose, crop, ask" in said.err
    assert here("distill", recipe, "--engine", "spark").code == 2
    here("distill", recipe, "-o", recipe).refuses(2, "is a file; name a folder")
    assert "give both, or neither" in here("distill", recipe, "--step", "vote").err
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "in"), "receipts:{data}"))
    assert "name it with --data FOLDER" in here("distill", recipe, "--dry-run").err


def test_decontaminate_names_pairs(here, tmp_path):
    for name in ("mine", "bench"):
        (tmp_path / name).mkdir()
    picture = Image.effect_noise((320, 240), 90).convert("RGB")
    picture.save(tmp_path / "bench/b.png")
    picture.resize((200, 150)).save(tmp_path / "mine/a.jpg")
    said = here("distill", "decontaminate", tmp_path / "mine", "--against", tmp_path / "bench")
    assert said.code == 0
    assert said.out.splitlines()[0].startswith("a.jpg  b.png  pHash ")
    assert said.out.splitlines()[1] == "1 of 1 pictures look like one of 1 benchmark pictures."
    assert here("distill", "decontaminate", tmp_path / "mine", "--against", tmp_path / "none").is_one_sentence
