"""Where calls go and what they may cost: checked settings, the same for every role behind an endpoint."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from qzoom.config import check_count, check_range
from qzoom.errors import ConfigError

__all__ = ["CallSettings", "EndpointSettings", "Sampling"]


_KEY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """One OpenAI-compatible endpoint.

    Args:
        url: of the API, e.g. http://127.0.0.1:8000/v1.
        model: its name there.
        key_env: environment variable that holds the key; "" sends none.
        timeout_s: of one request, from its first byte to the last of the reply.
        concurrency: most requests at once, by all processes of this machine together.
        requests_per_minute: at most, likewise; 0 does not limit them.
        prompt_price: of 1,000 prompt tokens, in the currency of the budget.
        completion_price: of 1,000 completion tokens.
        extra_body: further fields of the request, e.g. {"qzoom": {"zoom": "never"}}.
    """

    url: str
    model: str
    key_env: str = ""
    timeout_s: float = 120.0
    concurrency: int = 8
    requests_per_minute: float = 0.0
    prompt_price: float = 0.0
    completion_price: float = 0.0
    extra_body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not re.match(r"https?://[^\s/]+", self.url):
            raise ConfigError(f"An endpoint's url must start with http:// or https://, not {self.url!r}.")
        if "@" in self.url.split("/")[2]:
            raise ConfigError("An endpoint's url must hold no name or key; name the key's variable in key_env.")
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"The endpoint {self.url} needs the name of a model.")
        if not isinstance(self.key_env, str) or (self.key_env and not _KEY_NAME.fullmatch(self.key_env)):
            raise ConfigError(f"key_env of {self.url} must name an environment variable, not hold a key.")
        check_range(self, "timeout_s", 0.001, 86_400.0)
        check_count(self, "concurrency", 1, 4096)
        for name in ("requests_per_minute", "prompt_price", "completion_price"):
            check_range(self, name, 0.0, 1e9)
        if not isinstance(self.extra_body, dict):
            raise ConfigError(f"extra_body of {self.url} must be a mapping, not {self.extra_body!r}.")
        taken = {"model", "messages", "n", "stream"} & set(self.extra_body)
        if taken:
            raise ConfigError(f"extra_body of {self.url} must not set {', '.join(sorted(taken))}.")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra_body of {self.url} must hold plain JSON values ({error}).") from error

    @property
    def address(self) -> str:
        """Where chat completions are asked for."""
        return f"{self.url.rstrip('/')}/chat/completions"


@dataclass(frozen=True, slots=True)
class CallSettings:
    """How often a call is tried, and what all calls together may cost.

    Both budgets count everything that the call cache has ever paid for, so that starting again spends no more.

    Args:
        retries: after the first try, for failures that may pass.
        backoff_s: first pause; it doubles, and the real pause is drawn between nothing and it.
        longest_s: longest pause, also of those that an endpoint asks for.
        connect_s: an endpoint that does not answer within it when the run starts is down.
        budget_requests: most requests, repeated ones included; 0 does not limit them.
        budget_money: most money by the endpoints' prices; 0 does not limit it.
    """

    retries: int = 8
    backoff_s: float = 1.0
    longest_s: float = 60.0
    connect_s: float = 5.0
    budget_requests: int = 0
    budget_money: float = 0.0

    def __post_init__(self) -> None:
        check_count(self, "retries", 0, 1000)
        check_count(self, "budget_requests", 0, 10**12)
        for name in ("backoff_s", "longest_s"):
            check_range(self, name, 0.0, 86_400.0)
        check_range(self, "connect_s", 0.01, 3600.0)
        check_range(self, "budget_money", 0.0, 1e12)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How replies are drawn; part of what a kept call is found by. What is None is not sent.

    Args:
        temperature: 0 is greedy.
        top_p: nucleus share.
        max_tokens: of a reply.
        send_seed: send the sample's number as seed, so that an endpoint that honours it repeats itself.
    """

    temperature: float | None = 0.7
    top_p: float | None = 0.9
    max_tokens: int | None = 1024
    send_seed: bool = True

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_range(self, "temperature", 0.0, 100.0)
        if self.top_p is not None:
            check_range(self, "top_p", 1e-6, 1.0)
        if self.max_tokens is not None:
            check_count(self, "max_tokens", 1, 10**6)
        if not isinstance(self.send_seed, bool):
            raise ConfigError(f"send_seed must be true or false, not {self.send_seed!r}.")

    def fields(self, sample: int) -> dict[str, Any]:
        """As a request holds them.

        Args:
            sample: number of the sample, its seed.
        """
        seed = sample if self.send_seed else None
        values = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "seed": seed}
        return {name: value for name, value in values.items() if value is not None}
