"""Roles from settings: rules as they are, endpoints with one call cache between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qzoom.distill.by_endpoint import (
    EndpointAsker,
    EndpointMaker,
    EndpointReader,
    EndpointTeacher,
    EndpointValidator,
)
from qzoom.distill.by_rule import RuleAsker, RuleMaker, RuleReader, RuleTeacher, RuleValidator
from qzoom.distill.roles import Asker, Maker, Reader, RoleSettings, RolesSettings, Teacher, Validator
from qzoom.llm.cache import CallCache, Cost
from qzoom.llm.client import Client, SharedClient
from qzoom.scoring.judge import Judge

__all__ = ["Roles", "build_roles"]


@dataclass(frozen=True, slots=True)
class Roles:
    """All roles of a run; what is None takes no part.

    Args:
        asker: writes questions.
        validator: checks them.
        teachers: answer from the crop.
        judge: compares answers.
        maker: writes wrong options.
        student: answers the training view.
        guesser: answers without a picture.
        shared: what the endpoints share; None when all roles are rules.
        clients: of all endpoints.
        before: costs when the run began.
    """

    asker: Asker
    validator: Validator
    teachers: tuple[Teacher, ...]
    judge: Judge | None = None
    maker: Maker | None = None
    student: Reader | None = None
    guesser: Reader | None = None
    shared: SharedClient | None = None
    clients: tuple[Client, ...] = ()
    before: tuple[Cost, ...] = field(default=())

    def check(self) -> None:
        """Make sure that every endpoint is there, before anything is computed.

        Raises:
            EndpointError: one is down or refuses the key; it names role, address and reason.
        """
        for client in self.clients:
            client.check()

    def costs(self, *, all_time: bool = False) -> tuple[Cost, ...]:
        """What was asked and paid, by role, name and endpoint; of this run, or of all runs with this cache."""
        if self.shared is None:
            return ()
        now = self.shared.cache.costs()
        if all_time:
            return now
        began = {(cost.role, cost.name, cost.url): cost for cost in self.before}
        return tuple(cost.since(began.get((cost.role, cost.name, cost.url))) for cost in now)

    def close(self) -> None:
        """Let go of connections and the cache."""
        if self.shared is not None:
            self.shared.close()


def build_roles(settings: RolesSettings, cache: Path) -> Roles:
    """Make the roles of a run. Nothing is asked yet; see `Roles.check`.

    Args:
        settings: who plays which.
        cache: SQLite file of calls, made when there are endpoints.

    Raises:
        ConfigError: the file is no call cache, or one of another schema.
    """
    behind = any(member.by == "endpoint" for _, member in settings.members())
    shared = SharedClient(CallCache(cache), settings.calls) if behind else None
    clients: list[Client] = []

    def client(role: str, member: RoleSettings) -> Client | None:
        """Of a member behind an endpoint; None for a rule."""
        if shared is None or member.by == "rule":
            return None
        clients.append(Client(role, member.label, member.endpoints, member.sampling, shared))
        return clients[-1]

    asked, checked = settings.asker, settings.validator
    asks, checks = client("asker", asked), client("validator", checked)
    return Roles(
        RuleAsker(asked.label) if asks is None else EndpointAsker(asks, asked.max_pixels, asked.plain, asked.count),
        RuleValidator(checked.label) if checks is None else EndpointValidator(checks, checked.max_pixels),
        tuple(_teacher(one, client("teacher", one)) for one in settings.teachers),
        None if settings.judge is None else _judge(client("judge", settings.judge)),
        None if settings.maker is None else _maker(settings.maker, client("maker", settings.maker)),
        None if settings.student is None else _reader(settings.student, client("student", settings.student)),
        None if settings.guesser is None else _reader(settings.guesser, client("guesser", settings.guesser)),
        shared,
        tuple(clients),
        shared.cache.costs() if shared is not None else (),
    )


def _teacher(member: RoleSettings, client: Client | None) -> Teacher:
    if client is None:
        return RuleTeacher(member.name or "knows-the-answer", member.error_rate)
    return EndpointTeacher(client, member.max_pixels, member.plain)


def _judge(client: Client | None) -> Judge | None:
    return None if client is None else Judge(client)


def _maker(member: RoleSettings, client: Client | None) -> Maker:
    return RuleMaker(member.label) if client is None else EndpointMaker(client, member.max_pixels)


def _reader(member: RoleSettings, client: Client | None) -> Reader:
    if client is None:
        return RuleReader(member.name or "knows-the-answer", member.error_rate)
    return EndpointReader(client, member.max_pixels, member.plain)
