"""What each step made, kept so that a stopped run goes on: one file of JSON lines per step.

    steps/pictures.jsonl    {"schema": 1, "step": ..., "settings": ...}       first line
    steps/propose.jsonl     {"in": "<id of the input>", "out": [items]}       one line per input, written at once
    ...

Lines are only added; a torn last line is cut off. Inputs are found by the id of their content, never by position. Of
what is on the disk memory holds sixteen bytes a line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qzoom.errors import ConfigError, DataError
from qzoom.store.log import write_atomic

__all__ = ["StepStore", "StoreLock"]

SCHEMA = 1
_HINT = "restore it from a copy, or start over with --fresh"
_SYNC_SECONDS = 2.0
_SETTLE = 512
_START = b'{"in": "'


class StoreLock:
    """Keeps a second run out of a folder; a context manager.

    Raises:
        ConfigError: another run is at work there.
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Any = None

    def __enter__(self) -> StoreLock:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = (self._folder / ".lock").open("ab")
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"Another run is writing to {self._folder}; wait for it or stop it.") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class StepStore:
    """The file of one step. One process writes, its threads may read; close it at the end.

    Args:
        path: of the file; its folder is made.
        step: the step's name.
        settings: everything that decides its results, as JSON values.
        fresh: throw away what is there.

    Raises:
        ConfigError: results of other settings; it names what changed.
        DataError: the file holds something else, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, step: str, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self._header = json.loads(json.dumps({"schema": SCHEMA, "step": step, "settings": dict(settings)}))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if fresh or not path.exists() or path.stat().st_size == 0:
                write_atomic(path, (json.dumps(self._header) + "\n").encode())
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error
        self._synced = time.monotonic()
        self._lock = threading.Lock()
        try:
            self._check_header()
            self._read_index()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._keys) + len(self._new)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def get(self, key: str) -> list[Any] | None:
        """What an input gave; None when it was not worked on.

        Args:
            key: id of the input, twenty hex digits.

        Raises:
            DataError: its line was changed after it was written.
        """
        place = self._find(key)
        if place is None:
            return None
        line = self._line_at(place)
        try:
            row = json.loads(line)
            if row["in"] != key:
                raise ValueError
            out: list[Any] = row["out"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: the line of {key} is damaged; {_HINT}.") from error
        return out

    def add(self, key: str, out: Sequence[Any]) -> None:
        """Keep what an input gave: one write, on the disk within two seconds or when the store is closed.

        Raises:
            DataError: the input is there already, or the disk refuses.
        """
        if self._find(key) is not None:
            raise DataError(f"{self.path}: the result of {key} is there already; {_HINT}.")
        row = json.dumps({"in": key, "out": list(out)}, ensure_ascii=False, allow_nan=False)
        data = row.encode("utf-8", "surrogatepass") + b"\n"
        try:
            self._file.seek(self._end)
            written = self._file.write(data)
            if written != len(data):
                raise OSError(28, "No space left on device")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise _unwritable(self.path, error) from error
        with self._lock:
            self._new.append((_short(key), self._end))
            self._fresh[key] = self._end
            if len(self._new) >= _SETTLE:
                self._settle()
        self._end += len(data)

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._sync()
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _check_header(self) -> None:
        line = self._file.readline()
        try:
            there = json.loads(line)
            known = isinstance(there, dict) and there.get("schema") == SCHEMA and there["step"] == self._header["step"]
        except (ValueError, KeyError):
            known = False
        if not known:
            step = self._header["step"]
            raise DataError(f"{self.path} is not a file of the step {step} that this qzoom wrote; {_HINT}.")
        changed = _differences(there["settings"], self._header["settings"])
        if changed:
            raise ConfigError(
                f"{self.path} was made with other settings ({'; '.join(changed[:3])}); use --fresh to replace it "
                f"(--fresh --step {self._header['step']} replaces this step and the later ones), or another folder."
            )
        self._end = len(line)

    def _read_index(self) -> None:
        """Note where each input's line starts; cut off a torn last line."""
        self._new: list[tuple[int, int]] = []
        self._fresh: dict[str, int] = {}
        self._keys, self._places = np.empty(0, np.uint64), np.empty(0, np.int64)
        with self.path.open("rb") as file:
            file.seek(self._end)
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    break
                if not line.startswith(_START) or not line.endswith(b"]}\n"):
                    raise DataError(f"{self.path}, line {number}: not a result of this step; {_HINT}.")
                key = line[len(_START) : len(_START) + 20]
                try:
                    self._new.append((_short(key.decode()), self._end))
                except ValueError as error:
                    raise DataError(f"{self.path}, line {number}: not a result of this step; {_HINT}.") from error
                self._end += len(line)
                if len(self._new) >= 65536:
                    self._settle()
        self._settle()
        self._file.truncate(self._end)

    def _settle(self) -> None:
        """Move noted lines into the sorted arrays."""
        keys = np.concatenate([self._keys, np.array([key for key, _ in self._new], np.uint64)])
        places = np.concatenate([self._places, np.array([place for _, place in self._new], np.int64)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], places[order]
        self._new, self._fresh = [], {}

    def _find(self, key: str) -> int | None:
        with self._lock:
            if key in self._fresh:
                return self._fresh[key]
            keys, places = self._keys, self._places
        wanted = np.uint64(_short(key))
        at = int(np.searchsorted(keys, wanted))
        while at < len(keys) and keys[at] == wanted:
            place = int(places[at])
            if self._line_start(place) == key:
                return place
            at += 1
        return None

    def _line_start(self, place: int) -> str:
        return os.pread(self._file.fileno(), 20, place + len(_START)).decode("ascii", "replace")

    def _line_at(self, place: int) -> bytes:
        data, size = b"", 1 << 16
        while not data.endswith(b"\n"):
            data = os.pread(self._file.fileno(), size, place)
            end = data.find(b"\n")
            if end >= 0:
                return data[: end + 1]
            if len(data) < size:
                break
            size *= 4
        return data


def _short(key: str) -> int:
    if len(key) != 20:
        raise ValueError(key)
    return int(key[:16], 16)


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """What differs, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        out = []
        for key in dict.fromkeys([*there, *here]):
            out += _differences(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else str(key))
        return out
    return [] if there == here else [f"{prefix} was {there!r:.60}, is {here!r:.60}"]


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be written ({error.strerror or error}); check space and rights, then run again.")
