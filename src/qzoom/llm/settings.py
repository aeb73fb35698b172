"""Settings of language-model endpoints: addresses, retries, budgets, sampling."""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import Annotated, Any
from urllib.parse import urlsplit

from qzoom.errors import ConfigError
from qzoom.settings import Between, settings

_KEY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_FIELDS = {"model", "messages", "n", "stream"}
Seconds = Annotated[float, Between(0.0, 86_400.0)]
Amount = Annotated[float, Between(0.0, 1e9)]


@settings
class EndpointSettings:
    """One OpenAI-compatible endpoint."""

    url: str
    """Base address of the API, e.g. http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model at the endpoint."""
    key_env: str = ""
    """Environment variable that holds the API key; "" sends none."""
    timeout_s: Annotated[float, Between(0.001, 86_400.0)] = 120.0
    """Time limit of one request, from its first byte to the last byte of the reply."""
    concurrency: Annotated[int, Between(1, 4096)] = 8
    """Most simultaneous requests, counted over all processes of this machine."""
    requests_per_minute: Amount = 0.0
    """Rate limit, counted over all processes of this machine; 0 for none."""
    prompt_price: Amount = 0.0
    """Price of 1,000 prompt tokens, in the currency of the budget."""
    completion_price: Amount = 0.0
    """Price of 1,000 completion tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request body, e.g. {"qzoom": {"zoom": "never"}}."""

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise ConfigError(f"An endpoint's url must start with http:// or https://, not {self.url!r}.")
        if "@" in self.url.split("/")[2]:
            raise ConfigError("An endpoint's url must hold no name or key; name the key's variable in key_env.")
        if not self.model:
            raise ConfigError(f"The endpoint {self.url} needs the name of a model.")
        if self.key_env and not _KEY_NAME.fullmatch(self.key_env):
            raise ConfigError(f"key_env of {self.url} must name an environment variable, not hold a key.")
        taken = _OWN_FIELDS & set(self.extra_body)
        if taken:
            raise ConfigError(f"extra_body of {self.url} must not set {', '.join(sorted(taken))}.")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"extra_body of {self.url} must hold plain JSON values ({error}).") from error


@settings
class CallSettings:
    """Retries and budgets of all calls together.

    Both budgets count everything that the call cache has ever paid for, so that a rerun does not spend them again.
    """

    retries: Annotated[int, Between(0, 1000)] = 8
    """Retries after the first try, for transient failures."""
    backoff_s: Seconds = 1.0
    """First pause; it doubles with every retry, and the real pause is drawn between 0 and it."""
    longest_s: Seconds = 60.0
    """Longest pause, also of those that an endpoint asks for by Retry-After."""
    connect_s: Annotated[float, Between(0.01, 3600.0)] = 5.0
    """An endpoint that does not answer within this time when the run starts is down."""
    give_up: Annotated[int, Between(0, 10**6)] = 3
    """Calls of a role in a row that fail after all retries before the run stops; 0 never stops it."""
    budget_requests: Annotated[int, Between(0, 10**12)] = 0
    """Most requests, retries included; 0 for no limit."""
    budget_money: Annotated[float, Between(0.0, 1e12)] = 0.0
    """Most money by the endpoints' prices; 0 for no limit."""


@settings
class Sampling:
    """Sampling parameters, part of the key of a cached call. Parameters that are null are not sent."""

    temperature: Annotated[float, Between(0.0, 100.0)] | None = 0.7
    """0 is greedy."""
    top_p: Annotated[float, Between(1e-6, 1.0)] | None = 0.9
    """Nucleus sampling: total probability of the likeliest tokens."""
    max_tokens: Annotated[int, Between(1, 10**6)] | None = 1024
    """Longest reply."""
    send_seed: bool = True
    """Send the number of the sample as seed, for endpoints that honour it."""

    def fields(self, sample: int) -> dict[str, Any]:
        """The fields of a request body. `sample`: number of the sample, sent as seed."""
        seed = sample if self.send_seed else None
        values = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "seed": seed}
        return {name: value for name, value in values.items() if value is not None}


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False
