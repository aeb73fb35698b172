"""Every error response in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and its log entry.

A message that leaves the server is one of our own sentences; details of unexpected failures go to the log only.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from qzoom import errors
from qzoom.errors import QZoomError

INTERNAL = "The server failed on this request; its log says why."

_LOG = logging.getLogger("qzoom.serving")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable_media",
    429: "queue_full",
    431: "headers_too_large",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}
_CHAT = "send messages to /v1/chat/completions"
# Routes that clients may look for, and what to do instead.
_ELSEWHERE = {
    "/v1/completions": f"{_CHAT} (a prompt is a user's message)",
    "/v1/responses": f"{_CHAT} (in OpenAI's clients, chat.completions.create)",
    "/v1/embeddings": f"the model answers questions and embeds nothing; {_CHAT}",
    "/v1/files": f"{_CHAT}, with pictures as data URLs",
    "/v1/messages": _CHAT,
    "/completions": f"{_CHAT} (the base URL ends with /v1)",
    "/responses": f"{_CHAT} (the base URL ends with /v1)",
    "/chat/completions": f"{_CHAT} (the base URL ends with /v1)",
    "/models": "the models are at /v1/models (the base URL ends with /v1)",
}
# Status, code and `param` of each kind; the first that fits counts, so subclasses stand before their bases.
_KINDS: tuple[tuple[type[QZoomError], int, str | None, str | None], ...] = (
    (errors.QueueFullError, 429, None, None),
    (errors.StoppingError, 503, "stopping", None),
    (errors.EngineDownError, 503, "engine_down", None),
    (errors.EngineRefusedError, 502, "engine_refused", None),
    (errors.DeadlineError, 504, None, None),
    (errors.FetchRefusedError, 422, None, None),
    (errors.FetchTimeoutError, 504, "media_timeout", None),
    (errors.FetchFailedError, 503, "media_unavailable", None),
    (errors.ImageError, 400, "invalid_image", None),
    (errors.QuestionError, 400, "invalid_question", "messages"),
    (errors.BudgetError, 400, "invalid_budget", "qzoom.max_visual_tokens"),
    (errors.SchemaError, 400, "unsupported", "response_format"),
    (errors.ConfigError, 400, None, None),
    (errors.HeadsMissingError, 400, "cannot_zoom", "qzoom.zoom"),
)


class ApiError(QZoomError):
    """An error as a client sees it.

    Args:
        param: the field at fault, as `messages[0].content`; None when there is none.
        code: a word for programs; None takes the status's own.
        headers: to send along, e.g. Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def encoded(self) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """Headers and body of a response that is sent outside of the application and closes the connection."""
        body = json.dumps(self.body()).encode("ascii")
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= self.headers
        return [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers.items()], body


def from_exception(error: BaseException, param: str | None = None) -> ApiError:
    """The response to an exception; one that is not ours becomes a fixed text with status 500. `error`: what was
    raised. `param`: the field at fault, where the caller knows better than the error."""
    if isinstance(error, ApiError):
        return error
    headers = {}
    if isinstance(error, errors.QueueFullError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, errors.StoppingError | errors.EngineDownError):
        headers["Retry-After"] = "5"
    for kind, status, code, standard in _KINDS:
        if isinstance(error, kind):
            return ApiError(status, str(error), param=param or standard, code=code, headers=headers)
    return ApiError(500, INTERNAL)


def from_status(status: int, method: str, path: str) -> ApiError:
    """The response for an address or method that does not exist."""
    shown = ascii(path)[:100]
    if status == 404 and path.rstrip("/") in _ELSEWHERE:
        return ApiError(404, f"{path} is not served; {_ELSEWHERE[path.rstrip('/')]}.")
    if status == 404:
        return ApiError(404, f"There is no {shown} here; /openapi.json lists what there is.")
    if status == 405:
        return ApiError(405, f"{shown} does not take {ascii(method)[1:-1][:20]}.")
    return ApiError(status, "The request was refused." if status < 500 else INTERNAL)


def key_error(challenge: str) -> ApiError:
    """No API key, or a wrong one."""
    text = "Send one of the server's API keys: 'Authorization: Bearer KEY'."
    return ApiError(401, text, headers={"WWW-Authenticate": challenge})


def too_many_connections() -> ApiError:
    """One connection more than the server keeps."""
    return ApiError(503, "The server has too many connections; try again in a moment.", code="too_many_connections")


def body_too_large(most_bytes: int) -> ApiError:
    """A request body above the server's limit."""
    text = f"The body is larger than the limit of {mib(most_bytes)}; send smaller or fewer pictures."
    return ApiError(413, text, code="body_too_large")


def pictures_too_large(most_bytes: int) -> ApiError:
    """Encoded pictures of one request above the server's limit."""
    text = f"The pictures have more bytes together than the limit of {mib(most_bytes)}; shrink them or send fewer."
    return ApiError(413, text, param="messages", code="images_too_large")


def mib(count: int) -> str:
    """Bytes for an error sentence."""
    return f"{count / 2**20:.4g} MiB"


def log_failure(error: BaseException, request_id: str) -> None:
    """Log an error whose client is told a fixed text, under the request's id; ordinary refusals are not logged."""
    if from_exception(error).status == 500:
        _LOG.error("request %s failed", request_id, exc_info=error)
