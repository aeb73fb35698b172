"""Memory of a process that lives long: what requests took goes back to the system.

glibc keeps freed blocks in an arena per thread. Decoded pictures of many megabytes, allocated and freed on several
threads, then let a busy server grow for minutes.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache

__all__ = ["limit_arenas", "settle", "trim_memory"]

_ARENA_MAX = -8  # of malloc.h


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    try:
        found = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return found if hasattr(found, "malloc_trim") and hasattr(found, "mallopt") else None


def limit_arenas(count: int = 2) -> bool:
    """Let all threads share a few arenas; call it before threads start.

    Returns:
        Whether the C library took it; other libraries than glibc are left as they are.
    """
    libc = _libc()
    return libc is not None and libc.mallopt(_ARENA_MAX, count) == 1


def settle() -> None:
    """Leave what has been loaded out of later collections, so that those are quick; call it once, before serving."""
    gc.collect()
    gc.freeze()


def trim_memory() -> None:
    """Collect finished requests, whose errors and tasks refer to each other and so keep their pictures, and (glibc)
    give free pages back to the system; takes a few milliseconds after `settle`."""
    gc.collect()
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
