"""Memory of a process that serves for days: few arenas, quick collections, and freed pages given back.

glibc keeps freed blocks in an arena per thread. Decoded pictures of many megabytes, allocated and freed on several
threads, then let a busy process grow for minutes: a server, and each of its replicas.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from functools import cache

TRIM_S = 5.0
_ARENA_MAX = -8  # of malloc.h


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def limit_arenas(count: int = 2) -> bool:
    """Let all threads share a few arenas of glibc; call it before threads start. Returns whether the C library took it;
    other libraries than glibc are left as they are."""
    glibc = _glibc()
    return glibc is not None and glibc.mallopt(_ARENA_MAX, count) == 1


def settle() -> None:
    """Leave what has been loaded out of later collections, so that those are quick; call it once, before serving."""
    gc.collect()
    gc.freeze()


def trim_memory() -> None:
    """Collect finished requests, whose errors and tasks refer to each other and so keep their pictures, and (glibc)
    give free pages back to the system; takes a few milliseconds after `settle`."""
    gc.collect()
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def keep_trimmed() -> threading.Event:
    """Trim this process's memory every `TRIM_S` seconds, on a thread of its own, until the returned event is set."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(TRIM_S):
            trim_memory()

    threading.Thread(target=work, name="qzoom-trim", daemon=True).start()
    return ended
