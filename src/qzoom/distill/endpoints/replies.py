"""What an endpoint's answer means: a reply, a failure that may pass, a refusal of this call, or the end of the run."""

from __future__ import annotations

import email.utils
import json
import math
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["Fatal", "Outcome", "Passing", "Refused", "Reply", "read_reply"]

_PASSING = {408, 409, 425, 429}
_REFUSED = {400, 413, 422, 451}
_UNKNOWN_MODEL = ("model_not_found", "model not found", "does not exist", "unknown model")


@dataclass(frozen=True, slots=True)
class Reply:
    """A usable answer.

    Args:
        text: what the model wrote; it may be empty, which is an answer of no content.
        cut_off: it ran into its token limit.
        model: what the endpoint says answered.
        prompt_tokens: as counted by the endpoint, 0 when it does not say.
        completion_tokens: likewise.
    """

    text: str
    cut_off: bool = False
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Passing:
    """A failure that another try may mend; `wait_s` is what the endpoint asks for, None when it does not."""

    reason: str
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """This call is refused for good."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fatal:
    """All calls are refused: key, model name or address are wrong."""

    reason: str


Outcome = Reply | Passing | Refused | Fatal


def read_reply(status: int, retry_after: str | None, body: bytes) -> Outcome:
    """What a response means.

    Args:
        status: HTTP status.
        retry_after: that header.
        body: of the response.
    """
    if 200 <= status < 300:
        return _completion(body)
    if status in _PASSING or status >= 500:
        return Passing(f"HTTP {status}", _wait(retry_after))
    said = _complaint(body)
    if status in (401, 403):
        return Fatal(f"it refuses the key (HTTP {status})")
    if status in _REFUSED and not any(word in said.casefold() for word in _UNKNOWN_MODEL):
        return Refused(f"HTTP {status}" + (f": {said}" if said else ""))
    if status in (400, 404):
        return Fatal(f"it does not know the model or the address (HTTP {status})" + (f": {said}" if said else ""))
    return Fatal(f"HTTP {status}" + (f": {said}" if said else ""))


def _completion(body: bytes) -> Outcome:
    try:
        value: Any = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part.get("type") == "text")
        if text is None:
            text = choice["message"].get("refusal") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Passing("a reply that is no chat completion")
    if not isinstance(text, str):
        return Passing("a reply that is no chat completion")
    usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
    model = value.get("model")
    return Reply(
        text.encode("utf-8", "replace").decode(),
        choice.get("finish_reason") == "length",
        model if isinstance(model, str) else "",
        _tokens(usage.get("prompt_tokens")),
        _tokens(usage.get("completion_tokens")),
    )


def _tokens(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _complaint(body: bytes) -> str:
    """What an error body says, on one line, cut where it is long."""
    try:
        error = json.loads(body).get("error", "")
        said = error.get("message", "") if isinstance(error, dict) else error
        if isinstance(error, dict) and isinstance(error.get("code"), str):
            said = f"{said} ({error['code']})"
    except (ValueError, AttributeError, RecursionError):
        said = body[:200].decode("utf-8", "replace")
    return " ".join(str(said).split())[:200]


def _wait(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
