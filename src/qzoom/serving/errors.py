"""Every refusal in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, with the right status.

A text that leaves the server is either one of our own sentences or a fixed one; what broke goes to the log.

The server's log: all of it on standard error, and details of failures nowhere else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from qzoom.errors import (
    BudgetError,
    ConfigError,
    DeadlineError,
    FetchFailedError,
    FetchRefusedError,
    FetchTimeoutError,
    HeadsMissingError,
    ImageError,
    QuestionError,
    QueueFullError,
    QZoomError,
    StoppingError,
)

__all__ = ["ApiError", "from_exception", "from_status", "key_error", "log_config", "log_failure"]


INTERNAL = "The server failed on this request; its log says why."

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
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


# The first kind that fits counts: special ones before those that they derive from.
_KINDS: tuple[tuple[type[QZoomError], int, str | None, str | None], ...] = (
    (DeadlineError, 504, None, None),
    (FetchRefusedError, 422, None, None),
    (FetchTimeoutError, 504, "media_timeout", None),
    (FetchFailedError, 503, "media_unavailable", None),
    (ImageError, 400, "invalid_image", None),
    (QuestionError, 400, "invalid_question", "messages"),
    (BudgetError, 400, "invalid_budget", "qzoom"),
    (ConfigError, 400, None, None),
    (HeadsMissingError, 400, "cannot_zoom", "qzoom.zoom"),
)


class ApiError(QZoomError):
    """A refusal as a client sees it.

    Args:
        status: the HTTP status.
        message: the sentence.
        param: the field that is to blame, as `messages[0].content`; None when there is none.
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
        standard = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, standard)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def from_exception(error: BaseException, param: str | None = None) -> ApiError:
    """The refusal that an exception becomes; anything that is not ours becomes a fixed text with status 500.

    Args:
        error: what was raised.
        param: the field that is to blame, where the caller knows better than the error.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))})
    if isinstance(error, StoppingError):
        return ApiError(503, str(error), code="stopping", headers={"Retry-After": "5"})
    for kind, status, code, standard in _KINDS:
        if isinstance(error, kind):
            return ApiError(status, str(error), param=param or standard, code=code)
    return ApiError(500, INTERNAL)


def from_status(status: int, method: str, path: str) -> ApiError:
    """The refusal for an address or method that does not exist.

    Args:
        status: 404, 405 or another one that the router gave.
        method: of the request.
        path: of the request.
    """
    shown = ascii(path)[:100]
    if status == 404:
        return ApiError(404, f"There is no {shown} here; /openapi.json lists what there is.")
    if status == 405:
        return ApiError(405, f"{shown} does not take {ascii(method)[1:-1][:20]}.")
    return ApiError(status, "The request was refused." if status < 500 else INTERNAL)


def key_error() -> ApiError:
    """No key, or a wrong one."""
    return ApiError(401, "Send one of the server's API keys: 'Authorization: Bearer KEY'.")


_LOG = logging.getLogger("qzoom.serving")


def log_failure(error: BaseException) -> None:
    """Keep the details of an error whose client is told a fixed text; ordinary refusals are not logged."""
    if from_exception(error).status == 500:
        _LOG.error("a request failed", exc_info=error)


def log_config(level: str) -> dict[str, Any]:
    """Settings for `logging.config.dictConfig`.

    Args:
        level: "debug", "info", "warning" or "error"; single requests are logged from "info" down.
    """
    names = ("qzoom", "uvicorn", "uvicorn.access", "uvicorn.error")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}},
        "loggers": {name: {"handlers": ["stderr"], "level": level.upper(), "propagate": False} for name in names},
    }
