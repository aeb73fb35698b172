"""The server's log: all of it on standard error, and details of failures nowhere else."""

from __future__ import annotations

import logging
from typing import Any

from qzoom.serving.errors import from_exception

__all__ = ["log_config", "log_failure"]

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
