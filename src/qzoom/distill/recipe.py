"""The recipe of a data set: one checked YAML file that says where pictures come from and what every step does.

    pictures: [photos, questions.jsonl, "scenes:0:400", "receipts:FOLDER:SPLIT"]
    propose: {by: [given], select: {max_share: 0.1}}
    crop: {scale: 2.0}
    roles: {asker: {by: rule}, teachers: [...]}
    answer: {samples: 4}
    vote: {quorum: 6, per_teacher: 3, teachers: 2}
    choices: {...}          left out: open questions only
    difficulty: {...}       left out: no filter by difficulty
    export: {validation: 0.05}

Relative paths start from the working folder. An unknown key is an error that names the closest known one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qzoom.config import check_choice, check_count, read_yaml, refuse_unknown
from qzoom.distill.choices import ChoicesSettings
from qzoom.distill.crop import CropSettings
from qzoom.distill.decontaminate import AuditSettings
from qzoom.distill.difficulty import DifficultySettings
from qzoom.distill.export import ExportSettings
from qzoom.distill.proposers import ProposeSettings
from qzoom.distill.roles import RoleSettings, RolesSettings, roles_from_mapping
from qzoom.distill.vote import VoteSettings
from qzoom.errors import ConfigError

__all__ = ["AnswerSettings", "DistillRecipe", "RaySettings", "load_recipe", "recipe_from_values", "step_settings"]


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How often each teacher is asked.

    Args:
        samples: of each teacher.
        give_up: ask no more about a question once its teachers cannot agree any more; what is agreed on is the same.
    """

    samples: int = 4
    give_up: bool = False

    def __post_init__(self) -> None:
        check_count(self, "samples", 1, 1000)


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How Ray runs the steps.

    Args:
        address: of a running cluster; "" starts Ray on this machine for the run.
        actors: processes that work on pictures.
        threads: pictures that each works on at once.
    """

    address: str = ""
    actors: int = 2
    threads: int = 4

    def __post_init__(self) -> None:
        check_count(self, "actors", 1, 100_000)
        check_count(self, "threads", 1, 1000)


@dataclass(frozen=True, slots=True)
class DistillRecipe:
    """Everything that decides a data set.

    Args:
        pictures: folders, question files, "documents:FIRST:COUNT", "scenes:FIRST:COUNT", "receipts:FOLDER:SPLIT".
        roles: who asks, checks, answers, judges.
        propose: where to look.
        crop: what teachers see.
        answer: how often they are asked.
        vote: how many must agree.
        choices: multiple choice; None leaves it out.
        difficulty: the student's pass rate; None leaves it out.
        export: how rows are written.
        audit: benchmarks whose pictures must not be in the data.
        seed: of everything drawn.
        workers: pictures worked on at once, in-process.
        engine: "inprocess" or "ray".
        ray: how Ray runs.
    """

    pictures: tuple[str, ...]
    roles: RolesSettings
    propose: ProposeSettings = field(default_factory=ProposeSettings)
    crop: CropSettings = field(default_factory=CropSettings)
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    vote: VoteSettings = field(default_factory=VoteSettings)
    choices: ChoicesSettings | None = None
    difficulty: DifficultySettings | None = None
    export: ExportSettings = field(default_factory=ExportSettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    seed: int = 0
    workers: int = 8
    engine: Literal["inprocess", "ray"] = "inprocess"
    ray: RaySettings = field(default_factory=RaySettings)

    def __post_init__(self) -> None:
        check_count(self, "seed", 0, 2**31 - 1)
        check_count(self, "workers", 1, 1024)
        check_choice(self, "engine", ("inprocess", "ray"))
        if not self.pictures:
            raise ConfigError("pictures: none are named; list at least one folder, question file or drawn set.")
        self.vote.check_counts(len(self.roles.teachers), self.answer.samples)
        for part, role in (("choices", "maker"), ("difficulty", "student")):
            if getattr(self, part) is not None and getattr(self.roles, role) is None:
                raise ConfigError(f"{part} needs roles.{role}; name one, or leave {part} out.")
        if self.export.form == "choice" and self.choices is None:
            raise ConfigError("export.form is choice, but the recipe has no choices; add them or write form: open.")

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps that run, in order, without the export."""
        optional = [name for name in ("choices", "difficulty") if getattr(self, name) is not None]
        return ("propose", "crop", "ask", "validate", "answer", "vote", *optional)


def load_recipe(path: Path) -> DistillRecipe:
    """Read and check a recipe.

    Raises:
        ConfigError: it cannot be read, or a key or value is wrong; it says which.
    """
    values = read_yaml(path)
    return recipe_from_values(values, str(path))


def recipe_from_values(values: Any, source: str) -> DistillRecipe:
    """A recipe from plain values.

    Args:
        values: as YAML gives them, or as `dataclasses.asdict` of a recipe.
        source: for complaints.

    Raises:
        ConfigError: as `load_recipe`.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"Recipe {source} must be a mapping of settings at its top level.")
    recipe: DistillRecipe = _build(DistillRecipe, values, source)
    return recipe


def step_settings(recipe: DistillRecipe, step: str) -> dict[str, Any]:
    """What decides a step's results, as JSON values: neither addresses nor speeds."""
    roles = recipe.roles
    parts: dict[str, dict[str, Any]] = {
        "pictures": {},
        "propose": {"propose": dataclasses.asdict(recipe.propose), "seed": recipe.seed},
        "crop": dataclasses.asdict(recipe.crop),
        "ask": {"asker": _decides(roles.asker)},
        "validate": {"validator": _decides(roles.validator)},
        "answer": {"samples": recipe.answer.samples, "teachers": [_decides(one) for one in roles.teachers]}
        | ({"give_up": dataclasses.asdict(recipe.vote)} if recipe.answer.give_up else {}),
        "vote": {"vote": dataclasses.asdict(recipe.vote), "judge": _decides(roles.judge)},
    }
    if recipe.choices is not None:
        parts["choices"] = {
            "choices": dataclasses.asdict(recipe.choices),
            "maker": _decides(roles.maker),
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
    """A role without what only decides how fast or where it answers."""
    if role is None:
        return None
    values = dataclasses.asdict(role)
    bodies = [one.extra_body for one in role.endpoints]
    values["endpoints"] = {"model": role.endpoints[0].model, "extra_body": bodies} if bodies else None
    values["name"] = role.label
    return values


def _build(cls: type, values: Any, where: str) -> Any:
    """A settings class from a mapping, nested ones included."""
    if cls is RolesSettings:
        return roles_from_mapping(values, f"{where}: roles" if not where.endswith("roles") else where)
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of settings, not {type(values).__name__}.")
    refuse_unknown(cls, values, where)
    hints = typing.get_type_hints(cls)
    out = {key: _value(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    missing = [
        entry.name
        for entry in dataclasses.fields(cls)
        if entry.name not in out
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing.")
    try:
        return cls(**out)
    except ConfigError as error:
        raise ConfigError(str(error) if where in str(error) else f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _value(next(kind for kind in inner if kind is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {value!r:.60}.")
        if len(inner) != 2 or inner[1] is not Ellipsis:
            return tuple(value)
        return tuple(_value(inner[0], one, f"{where}, number {i}") for i, one in enumerate(value, start=1))
    plain = hint in (str, bool, int, float)
    if plain and not (isinstance(value, hint) or (hint is float and type(value) is int)):
        raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r:.60}.")
    if plain and isinstance(value, bool) and hint is not bool:
        raise ConfigError(f"{where} must be of type {hint.__name__}, not {value!r:.60}.")
    return value
