import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from qzoom.errors import BudgetError, ConfigError, RecipeError
from qzoom.settings import Between, from_mapping, read_settings, setting_fields, settings, to_dict


@settings(error=BudgetError)
class Budget:
    low: Annotated[int, Between(1)]
    """Fewest tokens."""
    high: Annotated[int, Between(1)]


@settings
class Box:
    scaling: Literal["exact", "float32"] = "exact"
    """How cells become pixels."""
    regions: Annotated[int, Between(1, 64)] = 1
    share: Annotated[float, Between(0, 1)] = 0.5


@settings
class Recipe:
    layers: Annotated[int, Between(1, 100)] = 3
    box: Box = field(default_factory=Box)
    budget: Budget | None = None
    stages: tuple[Box, ...] = ()
    presets: dict[str, Box] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.layers == 7:
            raise ConfigError("Recipe: seven layers never worked.")


def test_a_settings_class_is_a_frozen_dataclass():
    recipe = Recipe(4, budget=Budget(1, 2))
    assert (recipe.layers, recipe.budget, recipe.box) == (4, Budget(1, 2), Box())
    assert dataclasses.replace(recipe, layers=5).layers == 5
    assert hash(Budget(1, 2)) == hash(Budget(1, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.layers = 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": 0}, "Recipe.layers must be a whole number from 1 to 100, not 0."),
        ({"layers": True}, "Recipe.layers must be a whole number from 1 to 100, not True."),
        ({"layers": "3"}, "Recipe.layers must be a whole number from 1 to 100, not '3'."),
        ({"layer": 3}, "Recipe: unknown key 'layer'; did you mean 'layers'?"),
        ({"box": "wide"}, "Recipe.box must be a mapping with scaling, regions and share, not 'wide'."),
        ({"layers": 7}, "Recipe: seven layers never worked."),
    ],
)
def test_constructors_refuse_in_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError) as caught:
        Recipe(**arguments)
    assert str(caught.value) == sentence


def test_a_number_of_too_many_digits():
    with pytest.raises(ConfigError, match=r"must be a whole number from 1 to 100, not a number of thousands of digits"):
        Recipe(layers=10**5000)


def test_a_class_may_raise_its_own_error():
    with pytest.raises(BudgetError, match=r"Budget.low must be a whole number of at least 1, not 0"):
        Budget(0, 1)
    with pytest.raises(BudgetError, match=r"Budget.high is missing; give a whole number of at least 1"):
        Budget(1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (3, "a.yaml must be a mapping of settings, not int."),
        ({"layer": 1}, "a.yaml: unknown key 'layer'; did you mean 'layers'?"),
        ({"layers": 1.5}, "a.yaml: layers must be a whole number from 1 to 100, not 1.5."),
        ({"box": {"scalin": "exact"}}, "a.yaml: box: unknown key 'scalin'; did you mean 'scaling'?"),
        ({"box": {"scaling": "round"}}, "a.yaml: box.scaling must be one of exact, float32, not 'round'."),
        ({"box": {"share": float("nan")}}, "a.yaml: box.share must be a number from 0 to 1, not nan."),
        ({"box": {"share": float("inf")}}, "a.yaml: box.share must be a number from 0 to 1, not inf."),
        ({"stages": [{}, {"regions": 99}]}, "a.yaml: stages[1].regions must be a whole number from 1 to 64, not 99."),
        ({"stages": [{"foo": 1}]}, "a.yaml: stages[0]: unknown key 'foo'; known keys: scaling, regions, share."),
        ({"presets": {"doc": {"share": 3}}}, "a.yaml: presets.doc.share must be a number from 0 to 1, not 3."),
        ({"presets": {"doc": {"shar": 3}}}, "a.yaml: presets.doc: unknown key 'shar'; did you mean 'share'?"),
        ({"names": "a"}, "a.yaml: names must be a list, each item a text, not 'a'."),
        ({"budget": {"low": 1}}, "a.yaml: budget.high is missing; give a whole number of at least 1."),
        ({"budget": 3}, "a.yaml: budget must be a mapping with low and high or null, not 3."),
        ({"layers": 7}, "a.yaml: Recipe: seven layers never worked."),
        (
            {"folder": "\udcff"},
            "a.yaml: folder holds half a surrogate pair, which is no character; write it as valid UTF-8.",
        ),
        (
            {"a": {"\udcff": 1}},
            "a.yaml: a has a key that holds half a surrogate pair, which is no character; write it as valid UTF-8.",
        ),
    ],
)
def test_mappings_refuse_in_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Recipe, values, "a.yaml")
    assert str(caught.value) == sentence


def test_sources_and_the_way_back(tmp_path, monkeypatch):
    recipe = Recipe(2, Box(share=0.25), Budget(3, 4), (Box(), Box("float32")), {"doc": Box()}, ("a", "b"), Path("x"))
    values = to_dict(recipe)
    assert (values["names"], values["folder"]) == (["a", "b"], "x")
    assert from_mapping(Recipe, values, "again") == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text("layers: 5\nnames: [a]\nbox: {regions: 2}\n", encoding="utf-8")
    monkeypatch.setenv("QZOOM_TEST_NAMES", '["b", "c"]')
    monkeypatch.setenv("QZOOM_TEST_FOLDER", "out")
    read = read_settings(Recipe, path, env_prefix="QZOOM_TEST_", changes={"layers": 6, "folder": None})
    assert read == Recipe(6, Box(regions=2), names=("b", "c"), folder=Path("out"))
    with pytest.raises(ConfigError, match=r"recipe.yaml and the command line: layers must be"):
        read_settings(Recipe, path, changes={"layers": "many"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layers: 5\nbox:\n  share: 3\n", "r.yaml, line 3: box.share must be a number from 0 to 1, not 3."),
        ("layers: 5\nbox: {shar: 3}\n", "r.yaml, line 2: box: unknown key 'shar'; did you mean 'share'?"),
        ("layers: 5\nstages:\n- {}\n- regions: 99\n", "r.yaml, line 4: stages[1].regions must be a whole number"),
        ("layers: '5'\n", "r.yaml, line 1: layers must be a whole number from 1 to 100, not '5'."),
        ("layers: 5\nlayers: 6\n", "Recipe r.yaml: the key 'layers' stands twice, in lines 1 and 2; keep one."),
        ("layers: 5\nbox:\n  share: 1\n  share: 0\n", "the key 'share' stands twice, in lines 3 and 4"),
        ("layers: 5\nbox:\n\tshare: 1\n", "Recipe r.yaml, line 3, is not valid YAML: found character"),
        ("layers: &a [*a]\n", "Recipe r.yaml, line 1: an alias holds itself; write it out."),
        ("layers: 5\n2024-01-01: 5\n", "r.yaml, line 2: 2024-01-01 is a key of type date; write it in quotes."),
        (
            "presets:\n  2024-01-01: {}\n",
            "r.yaml, line 2: presets.2024-01-01 is a key of type date; write it in quotes.",
        ),
        (
            "layers: 0x" + "f" * 6000,
            "r.yaml, line 1: layers is a number of more than 4000 digits; write a smaller one.",
        ),
        ("a: 5\nlayers: " + "[" * 250 + "]" * 250, "r.yaml, line 2: layers.0.0.0.0 is nested more than 100 deep"),
        ("layers: 2020-13-45\n", "Recipe r.yaml is not valid YAML: month must be in 1..12."),
        ("", "Recipe r.yaml must be a mapping of settings, not NoneType."),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_settings(Recipe, Path("r.yaml"))
    assert sentence in str(caught.value)


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("\ufefflayers: 5\r\nbox: {share: 1e-4}\r\n", encoding="utf-8")
    assert read_settings(Recipe, path) == Recipe(5, Box(share=1e-4))
    path.write_bytes("layers: 5".encode("utf-16"))
    with pytest.raises(RecipeError, match="it is not UTF-8"):
        read_settings(Recipe, path)


def test_fields_carry_what_a_command_line_needs():
    scaling, regions, share = setting_fields(Box)
    assert (scaling.help, scaling.default) == ("How cells become pixels.", "exact")
    assert (regions.kind, regions.expects, regions.optional) == (int, "a whole number from 1 to 64", False)
    assert share.expects == "a number from 0 to 1"
    budget = setting_fields(Recipe)[2]
    assert (budget.kind, budget.optional) == (Budget, True)
