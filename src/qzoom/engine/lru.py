"""Values kept within a bound of memory: the least recently used ones make room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["LRUCache"]


Value = TypeVar("Value")


class LRUCache(Generic[Value]):
    """The most recently used values by key. Safe to use from several threads.

    Args:
        max_bytes: memory of all values together; 0 keeps nothing.
        size: bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._size = size
        self._bytes = 0
        self._values: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Memory of all values."""
        return self._bytes

    @property
    def entries(self) -> int:
        """Number of values held."""
        return len(self._values)

    def get(self, key: bytes) -> Value | None:
        """A value, which becomes the most recently used one."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return value

    def peek(self, key: bytes) -> Value | None:
        """A value, without counting as a use of it."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: bytes, value: Value) -> None:
        """Hold a value in place of an earlier one; one that is larger than the bound is not held."""
        size = self._size(value)
        with self._lock:
            if size > self.max_bytes:
                return
            old = self._values.pop(key, None)
            self._bytes += size - (self._size(old) if old is not None else 0)
            self._values[key] = value
            while self._bytes > self.max_bytes:
                _, dropped = self._values.popitem(last=False)
                self._bytes -= self._size(dropped)
