"""Calls of one role's member: kept replies first, then its endpoints in turn, with pauses, until one answers.

What does not pass ends the run at once and says role, address and reason: a refused key, an unknown model, endpoints
that were down from the start or stay down. What may pass is tried again, at the next endpoint first.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from qzoom.distill.endpoints.cache import CallCache, Cost
from qzoom.distill.endpoints.limits import Limits
from qzoom.distill.endpoints.messages import Message, call_key, wire
from qzoom.distill.endpoints.replies import Fatal, Outcome, Passing, Refused, Reply
from qzoom.distill.endpoints.settings import CallSettings, EndpointSettings, Sampling
from qzoom.distill.endpoints.transport import Transport
from qzoom.distill.roles.base import CallRefusedError
from qzoom.distill.steps import LaterError, StopRunError

__all__ = ["Client", "EndpointError", "Exchange"]

_GIVE_UP = 3
"""Calls in a row that fail to the end, or are all refused, before the run stops."""


class EndpointError(StopRunError):
    """An endpoint that cannot be used: down, a refused key, an unknown model."""


class Exchange:
    """What all clients of a run share: the cache, the connections, the limits.

    Args:
        cache: of calls.
        calls: retries and budgets.
    """

    def __init__(self, cache: CallCache, calls: CallSettings) -> None:
        self.cache = cache
        self.calls = calls
        self.transport = Transport()
        self.limits = Limits(cache)

    def close(self) -> None:
        """Let go of connections and file."""
        self.transport.close()
        self.cache.close()


class Client:
    """One member of a role; threads may share it.

    Args:
        role: "teacher" and so on.
        name: of the member.
        endpoints: that serve one model.
        sampling: how replies are drawn.
        exchange: what the run's clients share.
    """

    def __init__(
        self,
        role: str,
        name: str,
        endpoints: Sequence[EndpointSettings],
        sampling: Sampling,
        exchange: Exchange,
    ) -> None:
        self.role = role
        self.name = name
        self.endpoints = tuple(endpoints)
        self.sampling = sampling
        self.exchange = exchange
        self._turns = itertools.count()
        self._rests = [0.0 for _ in self.endpoints]
        self._lock = threading.Lock()
        self._lost = self._refused = 0
        self._answered = False

    @property
    def model(self) -> str:
        """Name of the member and of its model, for records."""
        model = self.endpoints[0].model
        return model if model == self.name else f"{self.name}: {model}"

    def check(self) -> None:
        """Make sure that every endpoint is there.

        Raises:
            EndpointError: one is down or refuses the key, or there is no key.
        """
        for endpoint in self.endpoints:
            if endpoint.key_env and not os.environ.get(endpoint.key_env):
                raise self._stop(endpoint, f"the environment variable {endpoint.key_env} holds no key")
            url = f"{endpoint.url.rstrip('/')}/models"
            status, reason = 0, ""
            for _ in range(2):
                status, reason = self.exchange.transport.reach(
                    url, self._headers(endpoint), self.exchange.calls.connect_s
                )
                if status:
                    break
            if status == 0:
                raise EndpointError(
                    f"The {self.role} {self.name!r} at {endpoint.url} is down: {reason}; start it or correct its url."
                )
            if status in (401, 403):
                raise self._stop(endpoint, f"it refuses the key (HTTP {status})")

    def call(self, messages: Sequence[Message], sample: int = 0) -> Reply:
        """The reply to a chat, kept or new.

        Args:
            messages: the chat.
            sample: its number; other numbers are other calls.

        Raises:
            CallRefusedError: the endpoint refuses this chat for good.
            LaterError: no endpoint answered for too long.
            EndpointError: no call can succeed.
            BudgetSpentError: nothing more may be spent.
        """
        first = self.endpoints[0]
        key = call_key(self.name, first.model, messages, self.sampling, first.extra_body, sample)
        cache = self.exchange.cache
        found = cache.find(key)
        if found is None:
            with cache.claim(key):
                found = cache.find(key)
                if found is None:
                    return self._opened(self._paid(key, messages, sample))
        cache.count(Cost(self.role, self.name, "", kept=1))
        return self._opened(found)

    def _opened(self, outcome: Reply | Refused) -> Reply:
        if isinstance(outcome, Refused):
            raise CallRefusedError(f"The {self.role} {self.name!r} refuses the request: {outcome.reason}")
        return outcome

    def _paid(self, key: str, messages: Sequence[Message], sample: int) -> Reply | Refused:
        """Ask until there is a reply or a refusal, and store it."""
        turn = next(self._turns)
        tries = [0 for _ in self.endpoints]
        free_at = [0.0 for _ in self.endpoints]
        reason = "it asks for a longer pause than longest_s"
        for _ in range(self.exchange.calls.retries + 1):
            number = self._choose(turn, free_at, tries)
            if number is None:
                break
            endpoint = self.endpoints[number]
            outcome = self._asked(endpoint, messages, sample)
            cost = Cost(self.role, self.name, endpoint.url)
            if isinstance(outcome, Passing):
                self.exchange.cache.count(replace(cost, failures=1))
                free_at[number] = self._pause(number, tries[number], outcome)
                tries[number] += 1
                reason = f"tries: {sum(tries)}, last at {endpoint.url}: {outcome.reason}"
                continue
            if isinstance(outcome, Fatal):
                self.exchange.cache.count(replace(cost, failures=1))
                raise self._stop(endpoint, outcome.reason)
            self.exchange.cache.store(key, outcome, _price(cost, endpoint, outcome))
            self._note(endpoint, outcome)
            return outcome
        raise self._lost_call(reason)

    def _asked(self, endpoint: EndpointSettings, messages: Sequence[Message], sample: int) -> Outcome:
        body = {
            "model": endpoint.model,
            "messages": wire(messages),
            **self.sampling.fields(sample),
            **endpoint.extra_body,
        }
        content = json.dumps(body, ensure_ascii=True).encode()
        calls = self.exchange.calls
        with self.exchange.limits.place(endpoint):
            cost = Cost(self.role, self.name, endpoint.url, requests=1)
            self.exchange.cache.reserve(cost, calls.budget_requests, calls.budget_money)
            return self.exchange.transport.post(endpoint.address, content, self._headers(endpoint), endpoint.timeout_s)

    def _choose(self, turn: int, free_at: Sequence[float], tries: Sequence[int]) -> int | None:
        """The next endpoint, after a pause if all need one; None when the pause would be too long."""
        order = [(turn + i) % len(self.endpoints) for i in range(len(self.endpoints))]
        with self._lock:
            ready = {i: max(free_at[i], self._rests[i]) for i in order}
        number = min(order, key=lambda i: (max(0.0, ready[i] - time.monotonic()), tries[i]))
        wait = ready[number] - time.monotonic()
        if wait > self.exchange.calls.longest_s:
            return None
        if wait > 0:
            time.sleep(wait)
        return number

    def _pause(self, number: int, tried: int, failure: Passing) -> float:
        """When this call may come back to an endpoint. What the endpoint itself asks for holds for all calls."""
        calls = self.exchange.calls
        now = time.monotonic()
        pause = random.uniform(0, min(calls.longest_s, calls.backoff_s * 2 ** min(tried, 60)))
        if failure.wait_s is None:
            return now + pause
        with self._lock:
            self._rests[number] = max(self._rests[number], now + failure.wait_s)
        return now + max(failure.wait_s, pause)

    def _note(self, endpoint: EndpointSettings, outcome: Reply | Refused) -> None:
        """Remember how it went; an endpoint that only ever refuses is no use."""
        with self._lock:
            self._lost = 0
            if isinstance(outcome, Reply):
                self._answered = True
                return
            self._refused += 1
            hopeless = not self._answered and self._refused >= _GIVE_UP
        if hopeless:
            raise self._stop(endpoint, f"it refuses every request ({outcome.reason})")

    def _lost_call(self, reason: str) -> Exception:
        with self._lock:
            self._lost += 1
            lost = self._lost
        said = f"The {self.role} {self.name!r} gave no answer ({reason})"
        if lost >= _GIVE_UP:
            return EndpointError(f"{said}, {lost} calls in a row; what was answered is kept: run again when it is up.")
        return LaterError(f"{said}; run again later.")

    def _stop(self, endpoint: EndpointSettings, reason: str) -> EndpointError:
        key = f" and the key in {endpoint.key_env}" if endpoint.key_env else " and key_env"
        return EndpointError(
            f"The {self.role} {self.name!r} at {endpoint.url} cannot be used: {reason}. Check url, model{key}."
        )

    def _headers(self, endpoint: EndpointSettings) -> dict[str, str]:
        key = os.environ.get(endpoint.key_env, "") if endpoint.key_env else ""
        return {"authorization": f"Bearer {key}"} if key else {}


def _price(cost: Cost, endpoint: EndpointSettings, outcome: Reply | Refused) -> Cost:
    if isinstance(outcome, Refused):
        return replace(cost, failures=1)
    money = outcome.prompt_tokens * endpoint.prompt_price + outcome.completion_tokens * endpoint.completion_price
    return replace(
        cost,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
        money=money / 1000,
    )
