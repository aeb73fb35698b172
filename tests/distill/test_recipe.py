import json
from pathlib import Path

import pytest
import yaml

from qzoom.distill.recipe import DatasetRecipe, load_recipe, step_settings
from qzoom.errors import ConfigError
from qzoom.settings import from_mapping, to_dict
from tests.distill.data import recipe_values

RECIPES = sorted((Path(__file__).parents[2] / "recipes/distill").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_their_first_line_runs_them(path):
    recipe = load_recipe(path, Path("my/data") if "{data}" in path.read_text() else None)
    assert recipe.pictures
    assert path.read_text().startswith(f"# qzoom distill recipes/distill/{path.name} ")


def test_a_recipe_survives_json():
    recipe = from_mapping(DatasetRecipe, recipe_values("scenes:0:2", choices={}, roles=RULES), "test")
    values = json.loads(json.dumps(to_dict(recipe)))
    assert from_mapping(DatasetRecipe, values, "again") == recipe


RULES = {"teachers": [{"by": "rule", "name": "a"}, {"by": "rule", "name": "b"}], "distractor_writer": {"by": "rule"}}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"propse": {}}, r"unknown key 'propse'; did you mean 'propose'"),
        ({"propose": {"select": {"max_shar": 0.1}}}, r"propose\.select: unknown key 'max_shar'; did you mean"),
        ({"crop": {"scale": "two"}}, r"crop\.scale must be a number from 0\.1 to 16, not 'two'"),
        ({"crop": {"margin": True}}, r"crop\.margin must be a number .*, not True"),
        ({"crop": []}, r"crop must be a mapping"),
        ({"pictures": "scenes:0:2"}, r"pictures must be a list"),
        ({"pictures": []}, r"pictures: none are named"),
        ({"pictures": [3]}, r"pictures\[0\] must be a text"),
        ({"vote": {"quorum": 20}}, r"can never give 20 votes"),
        ({"choices": {}}, r"choices needs roles\.distractor_writer"),
        ({"difficulty": {}}, r"difficulty needs roles\.student"),
        ({"export": {"form": "choice"}}, r"export\.form is choice, but the recipe has no choices"),
        ({"engine": "spark"}, r"engine must be one of inprocess, ray"),
        ({"workers": 0}, r"workers must be a whole number"),
        ({"roles": {}}, r"name at least one teacher"),
    ],
)
def test_mistakes_are_named(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        from_mapping(DatasetRecipe, recipe_values("scenes:0:2") | changes, "test")


def test_what_is_missing_or_no_recipe_is_named(tmp_path):
    values = recipe_values("scenes:0:2")
    del values["roles"]
    with pytest.raises(ConfigError, match="test: roles is missing"):
        from_mapping(DatasetRecipe, values, "test")
    (tmp_path / "a.yaml").write_text("pictures: [")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "c.yaml")


def test_addresses_and_speeds_decide_nothing():
    def settings(**endpoint):
        member = {"by": "endpoint", "name": "t", "endpoints": [{"url": "http://one/v1", "model": "m", **endpoint}]}
        vote = {"quorum": 3, "per_teacher": 3, "teachers": 1}
        values = recipe_values("scenes:0:2", roles={"teachers": [member]}, vote=vote)
        return step_settings(from_mapping(DatasetRecipe, values, "test"), "answer")

    assert settings() == settings(url="http://two/v1", concurrency=2, timeout_s=3.0, key_env="KEY")
    assert settings() != settings(extra_body={"qzoom": {"zoom": "never"}})


def test_data_stands_for_a_folder_and_must_be_given_where_it_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe_values("receipts:{data}:train", "scenes:0:2")))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(recipe_values("scenes:0:2")))
    assert load_recipe(tmp_path / "a.yaml", Path("my/data")).pictures == ("receipts:my/data:train", "scenes:0:2")
    with pytest.raises(ConfigError, match=r"a.yaml: pictures: 'receipts:\{data\}:train' needs .* --data FOLDER"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match=r"no entry of pictures has \{data\}"):
        load_recipe(tmp_path / "b.yaml", Path("my/data"))
