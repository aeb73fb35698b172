"""Read an untrusted pickle: only numpy arrays and builtin containers, in a separate process.

`labels.published` runs this file as a program. Only the names in `_ALLOWED` can be looked up, and each is replaced with
a function of this module that checks its arguments. So a pickle can neither import nor call anything, nor pass a state
to numpy. The process has limits on memory and time, because a pickle can still request huge objects.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

REFUSED = 3
"""Exit code for a pickle that names something else or is damaged."""


class RefusedError(Exception):
    """The pickle wants something that labels do not need."""


class _Type:
    """Stands for numpy.dtype while the pickle is read."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._order: Literal["<", ">", "|", "="] = "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise RefusedError("a type of array elements in an unusual state")
        self._order = state[1]

    def dtype(self) -> np.dtype[Any]:
        found = np.dtype(self._code)
        return found if self._order == "|" else found.newbyteorder(self._order)


class _Array:
    """Stands for numpy.ndarray while the pickle is read; its state is checked, then copied into a real array."""

    def __init__(self) -> None:
        self.value = np.zeros(0, np.int8)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array in an unusual state")
        _, shape, kind, fortran, data = state
        if isinstance(data, str):  # protocol 2 of Python 2
            data = data.encode("latin1")
        self.value = _filled(data, kind, shape, "F" if fortran is True else "C")


def _filled(data: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    """A checked array of plain numbers."""
    whole = isinstance(shape, tuple) and len(shape) <= 8 and all(type(side) is int and side >= 0 for side in shape)
    if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray) or not whole:
        raise RefusedError("an array of objects, or one in an unusual state")
    dtype = kind.dtype()
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise RefusedError("an array whose data do not fit its shape")
    return np.frombuffer(bytes(data), dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))  # type: ignore[call-overload]


def _dtype(*arguments: Any) -> _Type:
    """numpy.dtype for plain numbers and booleans."""
    code = arguments[0] if arguments else None
    if not isinstance(code, str) or re.fullmatch(r"[biuf][1248]", code) is None:
        raise RefusedError(f"arrays of {code!r:.40}")
    return _Type(code)


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    """An empty array, to be filled by its state."""
    if kind is not _ndarray or shape != (0,) or code not in (b"b", "b"):
        raise RefusedError("an array built in an unusual way")
    return _Array()


def _ndarray(*_: Any) -> Any:
    raise RefusedError("a call of numpy.ndarray")


def _scalar(kind: Any, data: Any = b"") -> Any:
    return _filled(data.encode("latin1") if isinstance(data, str) else data, kind, (), "C").item()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    if order not in ("C", "F"):
        raise RefusedError("an array of an unusual order")
    made = _Array()
    made.value = _filled(data, kind, shape, order)
    return made


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("an encoding other than latin1")
    return text.encode("latin1")


def _ordered(*items: Any) -> dict[Any, Any]:
    return dict(*items)


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
    **{(module, "_reconstruct"): _array for module in _NUMPY},
    **{(module, "scalar"): _scalar for module in _NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in _NUMERIC},
}


class _Unpickler(pickle.Unpickler):
    """Looks up nothing but the names above."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("a reference to something outside the file")


def load_restricted(data: bytes) -> Any:
    """Unpickle arrays and builtin containers. Arrays come as objects with the array in `value` (RefusedError: anything
    else is named)."""
    return _Unpickler(io.BytesIO(data)).load()


def _plain(value: Any, arrays: dict[str, np.ndarray], depth: int = 0) -> Any:
    """JSON types; arrays become {"__array__": name}."""
    if depth > 32:
        raise RefusedError("containers nested more than 32 deep")
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, _Array):
        name = f"a{len(arrays)}"
        arrays[name] = np.ascontiguousarray(value.value)
        return {"__array__": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise RefusedError("a mapping whose keys are neither texts nor whole numbers")
        return {str(key): _plain(item, arrays, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, arrays, depth + 1) for item in value]
    raise RefusedError(f"a value of type {type(value).__name__}")


def _limit(memory_bytes: int, seconds: int) -> None:
    """Bound this process, where the system can; the caller watches its memory where it cannot (macOS)."""
    import resource

    for what, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):
            continue


def main(arguments: list[str]) -> int:
    """Read `arguments[0]`, write `arguments[1]`.json and .safetensors; limits in bytes and seconds follow. Returns 0,
    or `REFUSED` with one line on standard error."""
    from safetensors.numpy import save_file

    source, target, memory, seconds = arguments
    _limit(int(memory), int(seconds))
    try:
        with open(source, "rb") as file:
            found = load_restricted(file.read())
        arrays: dict[str, np.ndarray] = {}
        plain = _plain(found, arrays)
        with open(f"{target}.json", "w", encoding="utf-8") as out:
            json.dump(plain, out, allow_nan=False)
        save_file(arrays, f"{target}.safetensors")
    except RefusedError as error:
        print(f"it holds {error}, which labels do not need", file=sys.stderr)
        return REFUSED
    except MemoryError:
        print("it needs more memory than is allowed", file=sys.stderr)
        return REFUSED
    except Exception as error:
        print(f"it is damaged ({type(error).__name__})", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
