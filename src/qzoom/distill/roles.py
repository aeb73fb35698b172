"""Roles: who writes questions, checks, answers and judges, by rule (`by_rule`) or by endpoint (`by_endpoint`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from PIL.Image import Image

from qzoom.distill import by_endpoint, by_rule
from qzoom.distill.items import Item, QuestionDraft, Vote
from qzoom.distill.pictures import Views
from qzoom.errors import ConfigError
from qzoom.llm.cache import CallCache, Cost
from qzoom.llm.client import Client, SharedClient
from qzoom.llm.settings import CallSettings, EndpointSettings, Sampling
from qzoom.scoring.judge import Judge
from qzoom.settings import Between, Share, settings

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Role(Generic[F]):
    """One member of a role."""

    name: str  # as in the recipe
    model: str  # model and weights as far as known, for the records
    call: F  # does the work. It may raise `StopRunError`, `LaterError`, or `CallRefusedError` for this one call.


QuestionWriter: TypeAlias = "Role[Callable[[Item, Views], Sequence[QuestionDraft]]]"
"""Questions about the crop, possibly none."""
Validator: TypeAlias = "Role[Callable[[Item, Views], str]]"
"""Why the question of an item cannot be used; "" when it can."""
Teacher: TypeAlias = "Role[Callable[[Item, Views, int], Vote]]"
"""Sample number i of the answer from the crop."""
DistractorWriter: TypeAlias = "Role[Callable[[Item, Views, int], Sequence[str]]]"
"""Up to so many wrong options, best first; the step checks them."""
Reader: TypeAlias = "Role[Callable[[Item, Image | None, str, int], Vote]]"
"""Sample number i of the answer to a text, with or without an image (student, guesser); the item is for rules only."""


_NAME = re.compile(r"[\w .:@/+-]{1,100}")
_SINGLE = ("question_writer", "validator", "judge", "distractor_writer", "student", "guesser")


@settings
class RoleSettings:
    """One member of a role."""

    by: Literal["rule", "endpoint"] = "rule"
    """Who does the work."""
    name: str = ""
    """Name for the records; teachers need different names. Two models that answer differently must not share a name,
    since cached calls are found by it."""
    endpoints: tuple[EndpointSettings, ...] = ()
    """Endpoints that serve the same model; calls take them in turn, and the next one when one fails."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling parameters."""
    plain: bool = False
    """Send the bare question without instructions, for small models."""
    count: Annotated[int, Between(1, 100)] = 3
    """Question writer: questions per target."""
    max_pixels: Annotated[int, Between(1024, 10**9)] = 4_194_304
    """Larger images are scaled down to it before they are sent."""
    error_rate: Share = 0.0
    """Teacher or student by rule: share of wrong answers. Such a teacher knows the answer: for tests and throughput,
    never for results."""

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
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


@settings
class RolesSettings:
    """All roles."""

    question_writer: RoleSettings = field(default_factory=RoleSettings)
    """Writes questions from the crop."""
    validator: RoleSettings = field(default_factory=RoleSettings)
    """Checks the questions."""
    teachers: tuple[RoleSettings, ...] = ()
    """Answer from the crop."""
    judge: RoleSettings | None = None
    """Compares answers that rules leave undecided; null keeps those apart."""
    distractor_writer: RoleSettings | None = None
    """Writes wrong options; null makes no choices."""
    student: RoleSettings | None = None
    """Answers the training view; null measures no difficulty."""
    guesser: RoleSettings | None = None
    """Answers choices without the image, to find questions that need no image; null leaves this check out."""
    calls: CallSettings = field(default_factory=CallSettings)
    """Retries and budgets of all endpoints."""

    def __post_init__(self) -> None:
        if not self.teachers:
            raise ConfigError("name at least one teacher in teachers.")
        labels = [teacher.label for teacher in self.teachers]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"two teachers are called {twice[0]!r}; give each a name of its own.")
        for role in ("judge", "guesser"):
            member = getattr(self, role)
            if member is not None and member.by != "endpoint":
                raise ConfigError(f"{role} must be by: endpoint; leave it out to do without.")

    def members(self) -> tuple[tuple[str, RoleSettings], ...]:
        """(role, settings) of all members, teachers one by one."""
        single = [(role, getattr(self, role)) for role in _SINGLE if getattr(self, role) is not None]
        return (*single, *(("teacher", teacher) for teacher in self.teachers))


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of a run, ready to be asked; None takes no part."""

    question_writer: QuestionWriter  # writes questions
    validator: Validator  # checks them
    teachers: tuple[Teacher, ...]  # answer from the crop
    judge: Judge | None = None  # compares answers
    distractor_writer: DistractorWriter | None = None  # writes wrong options
    student: Reader | None = None  # answers the training view
    guesser: Reader | None = None  # answers without an image
    shared: SharedClient | None = None  # what the endpoints share; None when all roles are rules
    clients: tuple[Client, ...] = ()  # of all endpoints
    before: tuple[Cost, ...] = ()  # costs when the run began

    def check(self) -> None:
        """Make sure that every endpoint is there, before anything is computed (EndpointError: one is down or refuses
        the key; it names role, address and reason)."""
        for client in self.clients:
            client.check()

    def costs(self) -> tuple[Cost, ...]:
        """Requests and costs of this run, by role, name and endpoint."""
        if self.shared is None:
            return ()
        before = {(cost.role, cost.name, cost.url): cost for cost in self.before}
        now = self.shared.cache.costs()
        return tuple(cost.since(before.get((cost.role, cost.name, cost.url))) for cost in now)

    def end(self, *, cancel: bool) -> None:
        """Let no endpoint be asked any more; see `SharedClient.end`."""
        if self.shared is not None:
            self.shared.end(cancel=cancel)

    def close(self) -> None:
        """Close connections and cache."""
        if self.shared is not None:
            self.shared.close()


CACHE = "calls.sqlite"
"""The cache of paid calls in the folder of a run."""


def build_roles(recipe: RolesSettings, cache: Path) -> Roles:
    """The roles of a recipe, with an SQLite cache of paid calls. Nothing is asked yet; see `Roles.check` (ConfigError:
    the file is no call cache, or one of another schema)."""
    by_models = any(member.by == "endpoint" for _, member in recipe.members())
    shared = SharedClient(CallCache(cache), recipe.calls) if by_models else None
    clients: list[Client] = []

    def client_of(kind: str, member: RoleSettings, shared: SharedClient) -> Client:
        clients.append(Client(kind.replace("_", " "), member.label, member.endpoints, member.sampling, shared))
        return clients[-1]

    def role(kind: str, member: RoleSettings | None, rule: Callable[..., Any], ask: Callable[..., Any]) -> Any:
        """A member as a role: a rule, or a function that asks its endpoints."""
        if member is None:
            return None
        if shared is None or member.by == "rule":
            knows = kind in ("teacher", "student")
            name = member.name or ("knows-the-answer" if knows else "rule")
            model = "rule that knows the answer" if knows else "rule"
            return Role(name, model, partial(rule, name=name, error_rate=member.error_rate) if knows else rule)
        client = client_of(kind, member, shared)
        return Role(client.name, client.model, partial(ask, client=client, member=member))

    return Roles(
        role("question_writer", recipe.question_writer, by_rule.write_questions, by_endpoint.write_questions),
        role("validator", recipe.validator, by_rule.validate, by_endpoint.validate),
        tuple(role("teacher", one, by_rule.answer, by_endpoint.answer) for one in recipe.teachers),
        None if recipe.judge is None or shared is None else Judge(client_of("judge", recipe.judge, shared)),
        role("distractor_writer", recipe.distractor_writer, by_rule.write_distractors, by_endpoint.write_distractors),
        role("student", recipe.student, by_rule.read, by_endpoint.read),
        role("guesser", recipe.guesser, by_rule.read, by_endpoint.read),
        shared,
        tuple(clients),
        shared.cache.costs() if shared is not None else (),
    )
