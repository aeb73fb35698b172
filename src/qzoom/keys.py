"""API keys from environment variables, and what a key may look like."""

from __future__ import annotations

import os
import re

from qzoom.errors import ConfigError


def check_key(key: str, name: str) -> None:
    """Make sure that a header can carry an API key. `name`: what the sentence calls it (ConfigError: the key is empty,
    or not printable ASCII without spaces)."""
    if not key:
        raise ConfigError(f"{name} is empty; leave it out, or put a key into it.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{name} has characters that a header cannot carry; use printable ASCII without spaces.")


def read_key(variable: str) -> str:
    """The key in an environment variable; "" where it is empty or not set (ConfigError: no header can carry it)."""
    key = os.environ.get(variable, "")
    if key:
        check_key(key, f"The key in {variable}")
    return key


def read_keys(variable: str) -> tuple[str, ...]:
    """The keys in an environment variable, separated by commas or blanks; none where it is not set (ConfigError: it is
    set but holds no key, which must not open a server to all)."""
    text = os.environ.get(variable)
    if text is None:
        return ()
    keys = tuple(key for key in re.split(r"[,\s]+", text) if key)
    if not keys:
        raise ConfigError(f"{variable} is set but empty; unset it, or put a key into it.")
    return keys
