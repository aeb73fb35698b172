"""Calls that fail once, as they do when memory is short."""

from collections.abc import Callable
from typing import Any

import pytest

SHORT = "DefaultCPUAllocator: can't allocate memory"
"""What torch raises on a CPU."""


def fail_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True
) -> list[tuple[Any, ...]]:
    """Let the first call of `owner.name` for which `when` is true fail.

    Returns:
        The arguments of the call that failed, once there has been one.
    """
    real, failed = getattr(owner, name), []

    def call(*arguments: Any, **named: Any) -> Any:
        if not failed and when(*arguments, **named):
            failed.append(arguments)
            raise RuntimeError(SHORT)
        return real(*arguments, **named)

    static = isinstance(owner, type) and isinstance(owner.__dict__[name], staticmethod)
    monkeypatch.setattr(owner, name, staticmethod(call) if static else call)
    return failed
