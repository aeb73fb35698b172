"""The recipe of a data set: one YAML file that says where images come from and what every step does.

    pictures: [photos, questions.jsonl, "scenes:0:400", "receipts:FOLDER:SPLIT", "receipts:{data}:train"]
    propose: {by: [given], select: {max_share: 0.1}}
    crop: {scale: 2.0}
    roles: {question_writer: {by: rule}, teachers: [...]}
    answer: {samples: 4}
    vote: {quorum: 6, per_teacher: 3, teachers: 2}
    choices: {...}          left out: open questions only
    difficulty: {...}       left out: no filter by difficulty
    export: {validation: 0.05}

Relative paths start from the working folder; `{data}` stands for the folder that `--data` names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from qzoom.data.crop import CropSettings
from qzoom.distill.choices import ChoicesSettings
from qzoom.distill.decontaminate import DecontaminateSettings
from qzoom.distill.difficulty import DifficultySettings
from qzoom.distill.export import ExportSettings
from qzoom.distill.proposers import ProposeSettings
from qzoom.distill.roles import RoleSettings, RolesSettings
from qzoom.distill.vote import VoteSettings
from qzoom.errors import ConfigError
from qzoom.settings import Between, from_mapping, read_yaml, settings

_DATA = "{data}"


@settings
class AnswerSettings:
    """How often each teacher is asked."""

    samples: Annotated[int, Between(1, 1000)] = 4
    """Samples of each teacher."""
    give_up: bool = False
    """Stop asking about a question once its teachers cannot agree any more; the agreed answers are the same."""


@settings
class RaySettings:
    """How Ray runs the steps."""

    address: str = ""
    """Address of a running cluster; "" starts Ray on this machine for the run."""
    actors: Annotated[int, Between(1, 100_000)] = 2
    """Processes that work on images."""
    threads: Annotated[int, Between(1, 1000)] = 4
    """Images that each process works on at once."""


@settings
class DatasetRecipe:
    """Everything that decides a data set."""

    pictures: tuple[str, ...]
    """Folders, question files, "documents:FIRST:COUNT", "scenes:FIRST:COUNT", "receipts:FOLDER:SPLIT"."""
    roles: RolesSettings
    """Who writes questions, checks, answers and judges."""
    propose: ProposeSettings = field(default_factory=ProposeSettings)
    """Where to look."""
    crop: CropSettings = field(default_factory=CropSettings)
    """What teachers see."""
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    """How often teachers are asked."""
    vote: VoteSettings = field(default_factory=VoteSettings)
    """How many must agree."""
    choices: ChoicesSettings | None = None
    """Multiple choice; null leaves it out."""
    difficulty: DifficultySettings | None = None
    """The student's pass rate; null leaves it out."""
    export: ExportSettings = field(default_factory=ExportSettings)
    """How rows are written."""
    decontaminate: DecontaminateSettings = field(default_factory=DecontaminateSettings)
    """Benchmarks whose images must not be in the data."""
    seed: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Seed of everything drawn at random."""
    workers: Annotated[int, Between(1, 1024)] = 8
    """Images worked on at once, in-process."""
    engine: Literal["inprocess", "ray"] = "inprocess"
    """What runs the steps."""
    ray: RaySettings = field(default_factory=RaySettings)
    """How Ray runs."""

    def __post_init__(self) -> None:
        if not self.pictures:
            raise ConfigError("pictures: none are named; list at least one folder, question file or drawn set.")
        self.vote.check_counts(len(self.roles.teachers), self.answer.samples)
        for part, role in (("choices", "distractor_writer"), ("difficulty", "student")):
            if getattr(self, part) is not None and getattr(self.roles, role) is None:
                raise ConfigError(f"{part} needs roles.{role}; name one, or leave {part} out.")
        if self.export.form == "choice" and self.choices is None:
            raise ConfigError("export.form is choice, but the recipe has no choices; add them or write form: open.")

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps that run, in order, without the export."""
        optional = [name for name in ("choices", "difficulty") if getattr(self, name) is not None]
        return ("propose", "crop", "ask", "validate", "answer", "vote", *optional)


def load_recipe(path: Path, data: Path | None = None) -> DatasetRecipe:
    """Read and check a recipe.

    Args:
        path: of the YAML file.
        data: folder that `{data}` in `pictures` stands for.

    Raises:
        ConfigError: it cannot be read, a key or value is wrong, or `{data}` is not given; it says which.
    """
    recipe = recipe_from_values(read_yaml(path), str(path))
    open_names = [name for name in recipe.pictures if _DATA in name]
    if open_names and data is None:
        raise ConfigError(
            f"{path}: pictures: {open_names[0]!r} needs a folder of your own; name it with --data FOLDER, or remove "
            "the entry from the recipe."
        )
    if data is not None and not open_names:
        raise ConfigError(f"{path}: --data is given, but no entry of pictures has {_DATA} in it.")
    names = tuple(name.replace(_DATA, str(data)) for name in recipe.pictures)
    return dataclasses.replace(recipe, pictures=names)


def recipe_from_values(values: Any, source: str) -> DatasetRecipe:
    """A recipe from plain values.

    Args:
        values: as YAML gives them, or as `settings.to_dict` of a recipe.
        source: file, for the error sentence.

    Raises:
        ConfigError: as `load_recipe`.
    """
    return from_mapping(DatasetRecipe, values, source)


def step_settings(recipe: DatasetRecipe, step: str) -> dict[str, Any]:
    """The settings that decide a step's results, as JSON values: neither addresses nor speeds."""
    roles = recipe.roles
    parts: dict[str, dict[str, Any]] = {
        "pictures": {},
        "propose": {"propose": dataclasses.asdict(recipe.propose), "seed": recipe.seed},
        "crop": dataclasses.asdict(recipe.crop),
        "ask": {"question_writer": _decides(roles.question_writer)},
        "validate": {"validator": _decides(roles.validator)},
        "answer": {"samples": recipe.answer.samples, "teachers": [_decides(one) for one in roles.teachers]}
        | ({"give_up": dataclasses.asdict(recipe.vote)} if recipe.answer.give_up else {}),
        "vote": {"vote": dataclasses.asdict(recipe.vote), "judge": _decides(roles.judge)},
    }
    if recipe.choices is not None:
        parts["choices"] = {
            "choices": dataclasses.asdict(recipe.choices),
            "distractor_writer": _decides(roles.distractor_writer),
            "guesser": _decides(roles.guesser),
            "judge": _decides(roles.judge),
        }
    if recipe.difficulty is not None:
        parts["difficulty"] = {
            "difficulty": dataclasses.asdict(recipe.difficulty),
            "student": _decides(roles.student),
            "judge": _decides(roles.judge),
        }
    return parts[step]


def _decides(role: RoleSettings | None) -> dict[str, Any] | None:
    """The settings of a role without those that only decide how fast or where it answers."""
    if role is None:
        return None
    values = dataclasses.asdict(role)
    bodies = [one.extra_body for one in role.endpoints]
    values["endpoints"] = {"model": role.endpoints[0].model, "extra_body": bodies} if bodies else None
    values["name"] = role.label
    return values
