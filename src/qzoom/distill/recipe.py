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
from qzoom.errors import ConfigError, RecipeError
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
    """Read and check a YAML recipe; `data` is the folder that `{data}` in `pictures` stands for (RecipeError: it cannot
    be read, a key or value is wrong, or `{data}` is not given; it says which)."""
    recipe = from_mapping(DatasetRecipe, read_yaml(path), str(path), recipe=path)
    open_names = [name for name in recipe.pictures if _DATA in name]
    if open_names and data is None:
        raise RecipeError(
            f"{path}: pictures: {open_names[0]!r} needs a folder of your own; name it with --data FOLDER, or remove "
            "the entry from the recipe."
        )
    if data is not None and not open_names:
        raise RecipeError(f"{path}: --data is given, but no entry of pictures has {_DATA} in it.")
    names = tuple(name.replace(_DATA, str(data)) for name in recipe.pictures)
    return dataclasses.replace(recipe, pictures=names)


_PARTS: dict[str, tuple[str, ...]] = {
    "pictures": (),
    "propose": ("propose", "seed"),
    "ask": ("question_writer",),
    "validate": ("validator",),
    "vote": ("vote", "judge"),
    "choices": ("choices", "distractor_writer", "guesser", "judge"),
    "difficulty": ("difficulty", "student", "judge"),
}
"""Parts of the recipe, roles among them, that decide a step's results."""


def step_settings(recipe: DatasetRecipe, step: str) -> dict[str, Any]:
    """The settings that decide a step's results, as JSON values: neither addresses nor speeds."""
    if step == "crop":
        return dataclasses.asdict(recipe.crop)
    if step == "answer":
        values = {"samples": recipe.answer.samples, "teachers": [_decides(one) for one in recipe.roles.teachers]}
        return values | ({"give_up": dataclasses.asdict(recipe.vote)} if recipe.answer.give_up else {})
    return {part: _decides(getattr(recipe, part, getattr(recipe.roles, part, None))) for part in _PARTS[step]}


def _decides(part: Any) -> Any:
    """A part of the recipe as JSON values; of a role without what only decides how fast or where it answers."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    values = dataclasses.asdict(part)
    if isinstance(part, RoleSettings):
        bodies = [one.extra_body for one in part.endpoints]
        values["endpoints"] = {"model": part.endpoints[0].model, "extra_body": bodies} if bodies else None
        values["name"] = part.label
    return values
