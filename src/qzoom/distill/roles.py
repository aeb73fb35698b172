"""What each role does. A step knows only these; whether a rule or a model stands behind one is decided in a recipe.

Every role has a `name` and a `model` (model and weights as far as known), which the items keep. Calls may raise
`StopRunError` and `LaterError` of `qzoom.distill.items`, or `CallRefusedError` for this one call.

Who plays which role: the part of a recipe that names endpoints and rules.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qzoom.config import check_choice, check_count, check_range, from_mapping
from qzoom.distill.items import Asked, Item, Region, Vote
from qzoom.errors import ConfigError, DataError
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.items import Views

__all__ = [
    "Asker",
    "Maker",
    "Reader",
    "Role",
    "RoleSettings",
    "RolesSettings",
    "Teacher",
    "Validator",
    "roles_from_mapping",
    "with_model",
]


class Role(Protocol):
    """What all have."""

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    @property
    def model(self) -> str:
        """What answers."""
        ...


class Asker(Role, Protocol):
    """Writes questions about a crop."""

    def ask(self, item: Item, views: Views) -> Sequence[Asked]:
        """Questions, possibly none."""
        ...


class Validator(Role, Protocol):
    """Says whether a question can be used."""

    def check(self, item: Item, views: Views) -> str:
        """Why not; "" when it can."""
        ...


class Teacher(Role, Protocol):
    """Answers from the crop."""

    def answer(self, item: Item, views: Views, sample: int) -> Vote:
        """Sample number `sample` of it."""
        ...


class Maker(Role, Protocol):
    """Writes wrong options."""

    def distractors(self, item: Item, views: Views, count: int) -> Sequence[str]:
        """Up to `count` of them, best first; the step checks them."""
        ...


class Reader(Role, Protocol):
    """The student, or whoever guesses without a picture."""

    def read(self, item: Item, image: Image | None, text: str, sample: int) -> Vote:
        """Sample number `sample` of its answer to a text, with or without a picture; the item is for rules only."""
        ...


def with_model(item: Item, role: str, model: str) -> Item:
    """The item with one more model noted, once."""
    if not model or (role, model) in item.models:
        return item
    return dataclasses.replace(item, models=(*item.models, (role, model)))


def region_of(item: Item) -> Region:
    """The item's region.

    Raises:
        DataError: it has none.
    """
    if item.region is None:
        raise DataError("This item has no region; run the step propose first.")
    return item.region


def asked_of(item: Item) -> Asked:
    """The item's question.

    Raises:
        DataError: it has none.
    """
    if item.asked is None:
        raise DataError("This item has no question; run the step ask first.")
    return item.asked


_NAME = re.compile(r"[\w .:@/+-]{1,100}")


@dataclass(frozen=True, slots=True)
class RoleSettings:
    """One member of a role.

    Args:
        by: "rule", or "endpoint".
        name: for the records; teachers need names that differ. Two models that answer differently must not share one,
            since kept calls are found by it.
        endpoints: that serve the same model; calls go round them, and on to the next when one fails.
        sampling: how replies are drawn.
        plain: put the bare question, without a word on how to answer, for small models.
        count: asker: questions per place.
        max_pixels: larger pictures are scaled down to it before they are sent.
        error_rate: teacher or student by rule: share of wrong answers, drawn from the item. Such a teacher is told the
            answer: for tests and throughput, never for results.
    """

    by: Literal["rule", "endpoint"] = "rule"
    name: str = ""
    endpoints: tuple[EndpointSettings, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    plain: bool = False
    count: int = 3
    max_pixels: int = 4_194_304
    error_rate: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "by", ("rule", "endpoint"))
        check_count(self, "count", 1, 100)
        check_count(self, "max_pixels", 1024, 10**9)
        check_range(self, "error_rate", 0.0, 1.0)
        if not isinstance(self.plain, bool):
            raise ConfigError(f"plain must be true or false, not {self.plain!r}.")
        if not isinstance(self.name, str) or (self.name and not _NAME.fullmatch(self.name)):
            raise ConfigError(f"A role's name must be a short text without line breaks, not {self.name!r}.")
        if self.by == "endpoint" and not self.endpoints:
            raise ConfigError("A role by endpoint needs at least one entry in endpoints.")
        if self.by == "rule" and self.endpoints:
            raise ConfigError("A role by rule has no endpoints; remove them or set by: endpoint.")
        if len({one.model for one in self.endpoints}) > 1:
            raise ConfigError(
                "The endpoints of one role must serve the same model; several models are several teachers."
            )

    @property
    def label(self) -> str:
        """The name, else the model's, else "rule"."""
        return self.name or (self.endpoints[0].model if self.endpoints else "rule")


@dataclass(frozen=True, slots=True)
class RolesSettings:
    """All roles.

    Args:
        asker: writes questions from the crop.
        validator: checks them.
        teachers: answer from the crop.
        judge: compares answers that rules leave open; None leaves those apart.
        maker: writes wrong options; None makes no choices.
        student: answers the training view; None measures no difficulty.
        guesser: answers choices without the picture, to find those that need none; None leaves that check out.
        calls: retries and budgets of all endpoints.
    """

    asker: RoleSettings = field(default_factory=RoleSettings)
    validator: RoleSettings = field(default_factory=RoleSettings)
    teachers: tuple[RoleSettings, ...] = ()
    judge: RoleSettings | None = None
    maker: RoleSettings | None = None
    student: RoleSettings | None = None
    guesser: RoleSettings | None = None
    calls: CallSettings = field(default_factory=CallSettings)

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ConfigError("roles: name at least one teacher in teachers.")
        labels = [teacher.label for teacher in self.teachers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"roles: two teachers are called {twice[0]!r}; give each a name of its own.")
        for role in ("judge", "guesser"):
            member = getattr(self, role)
            if member is not None and member.by != "endpoint":
                raise ConfigError(f"roles: {role} must be by: endpoint; leave it out to do without.")

    def members(self) -> tuple[tuple[str, RoleSettings], ...]:
        """(role, settings) of all that are there, teachers one by one."""
        single = ("asker", "validator", "judge", "maker", "student", "guesser")
        out = [(role, getattr(self, role)) for role in single if getattr(self, role) is not None]
        return (*out, *(("teacher", teacher) for teacher in self.teachers))


def roles_from_mapping(values: Any, source: str) -> RolesSettings:
    """The roles of a recipe.

    Args:
        values: what stands in the YAML file.
        source: file and section, for complaints.

    Raises:
        ConfigError: an unknown key (with the closest known one) or a bad value; it says where.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of roles, not {type(values).__name__}.")
    out = dict(values)
    for role in ("asker", "validator", "judge", "maker", "student", "guesser"):
        if out.get(role) is not None:
            out[role] = _role(out[role], f"{source}: {role}")
        elif role in ("asker", "validator"):
            out.pop(role, None)
    teachers = _listed(out.get("teachers", []), f"{source}: teachers")
    out["teachers"] = tuple(_role(one, f"{source}: teachers, number {i}") for i, one in enumerate(teachers, start=1))
    if "calls" in out:
        out["calls"] = _made(CallSettings, out["calls"], f"{source}: calls")
    made: RolesSettings = _made(RolesSettings, out, source)
    return made


def _role(values: Any, source: str) -> RoleSettings:
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of settings, not {type(values).__name__}.")
    out = dict(values)
    endpoints = _listed(out.get("endpoints", []), f"{source}: endpoints")
    out["endpoints"] = tuple(
        _made(EndpointSettings, one, f"{source}: endpoints, number {i}") for i, one in enumerate(endpoints, start=1)
    )
    if "sampling" in out:
        out["sampling"] = _made(Sampling, out["sampling"], f"{source}: sampling")
    made: RoleSettings = _made(RoleSettings, out, source)
    return made


def _made(cls: type, values: Any, source: str) -> Any:
    """`from_mapping`, with the source in front of complaints about values too."""
    try:
        return from_mapping(cls, values, source)
    except ConfigError as error:
        raise ConfigError(str(error) if source in str(error) else f"{source}: {error}") from error


def _listed(value: Any, source: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{source} must be a list, not {value!r:.60}.")
    return list(value)
