"""An append-only log: a file of JSON lines that is complete after every crash, and the atomic writes beside it.

    {"schema": 2, "purpose": "ask", "settings": {...}, "about": {...}}     first line: what made the file
    {"key": "cat.png", "items": [...]}                                     one line per append

Lines are only added, each by one write. When a log is opened for writing, a torn last line is cut off, so a killed
process loses the append in progress and nothing else. A log is continued with the same settings only. Keys and the
places of their lines are in memory (some 200 bytes a line), items are read when they are asked for. Labels
(`qzoom.store.schema`), the steps of distillation and the answers of an evaluation are kept this way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qzoom.errors import ConfigError, DataError

SCHEMA = 2
_HINT = "restore it from a copy, or start over with --fresh"
_START, _MIDDLE, _END = b'{"key": "', b'", "items": [', b"]}\n"


class Log:
    """A log for reading. Reading repairs nothing; a torn last line is not seen. Several threads may read.

    Args:
        purpose: what it must hold, e.g. "answers"; None accepts every purpose.
        repeats: of several lines of a key the last one counts; otherwise they are damage.

    Raises:
        DataError: no such file, another purpose or schema, or a damaged line; it says which.
    """

    def __init__(self, path: Path, purpose: str | None = None, *, repeats: bool = False) -> None:
        self.path, self._repeats = path, repeats
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
        self._open(purpose)

    @property
    def purpose(self) -> str:
        """What the log is for."""
        return str(self._header["purpose"])

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what it holds."""
        return dict(self._header["settings"])

    @property
    def about(self) -> dict[str, Any]:
        """Facts that may change between the runs that fill it."""
        return dict(self._header["about"])

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def __iter__(self) -> Iterator[tuple[str, list[Any]]]:
        """Keys and items in the order in which they were added."""
        for number, offset, line in self._lines():
            if offset >= self._end:
                return
            key, items = self._parse(line, f"line {number}")
            if not self._repeats or self._offsets.get(key) == offset:
                yield key, items

    def get(self, key: str) -> list[Any] | None:
        """The items of a key; None if it was not added (DataError: the line was changed after it was written)."""
        offset = self._offsets.get(key)
        return None if offset is None else self._parse(self._line_at(offset), f"the line of {key}")[1]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _open(self, purpose: str | None) -> None:
        """Read the header and the index."""
        try:
            self._header = _read_header(self._file.readline(), self.path, purpose)
            self._start = self._end = self._file.tell()
            self._offsets: dict[str, int] = {}
            for number, offset, line in self._lines():
                key = _key_of(line, f"{self.path}, line {number}")
                if key in self._offsets and not self._repeats:
                    raise DataError(f"{self.path}: {key!r} is there twice; {_HINT}.")
                self._offsets[key], self._end = offset, offset + len(line)
        except BaseException:
            self._file.close()
            raise

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of every complete line after the header."""
        offset = self._start
        with self.path.open("rb") as file:
            file.seek(offset)
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    return
                yield number, offset, line
                offset += len(line)

    def _line_at(self, offset: int) -> bytes:
        data, size = b"", 1 << 16
        while (end := data.find(b"\n")) < 0:
            size = 4 * size if data else size
            longer = os.pread(self._file.fileno(), size, offset)
            if len(longer) == len(data):
                return data
            data = longer
        return data[: end + 1]

    def _parse(self, line: bytes, where: str) -> tuple[str, list[Any]]:
        try:
            row = json.loads(line)
            return row["key"], row["items"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: {where} is damaged; {_HINT}.") from error


class LogWriter(Log):
    """A log for writing, locked while it is open; one thread writes, others may read. A context manager.

    Args:
        settings: everything that decides what it holds, as JSON values.
        about: facts that may change between runs, for its readers.
        fresh: replace what is there.
        sync_s: bring appends to the disk after so many seconds at the latest; 0 does it with each.
        advice: what to do about a log of other settings.
        repeats: as in `Log`; a key may be added again.

    Raises:
        ConfigError: a log of other settings (it names what changed), or one that another process is writing.
        DataError: the file holds something else, is damaged, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        purpose: str,
        settings: Mapping[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        fresh: bool = False,
        sync_s: float = 0.0,
        advice: str = "use --fresh to replace it, or name another file",
        repeats: bool = False,
    ) -> None:
        self.path, self._repeats = path, repeats
        self._sync_s, self._synced = sync_s, time.monotonic()
        header = {"schema": SCHEMA, "purpose": purpose, "settings": dict(settings), "about": dict(about or {})}
        header = json.loads(json.dumps(header, allow_nan=False))
        self._file = open_locked(path, fresh=fresh)
        try:
            if path.stat().st_size == 0:
                self._file.write(_line(header))
                self._sync()
                self._file.seek(0)
        except OSError as error:
            raise unwritable(path, error) from error
        self._open(purpose)
        if changed := differences(self._header["settings"], header["settings"]):
            self._file.close()
            raise ConfigError(f"{path} was made with other settings ({'; '.join(changed[:3])}); {advice}.")
        if os.fstat(self._file.fileno()).st_size > self._end:
            os.ftruncate(self._file.fileno(), self._end)

    def append(self, key: str, items: Sequence[Any]) -> None:
        """Add the items of a key (DataError: the key is there already, or the disk refuses; the log is as it was
        then)."""
        if key in self and not self._repeats:
            raise DataError(f"{self.path}: {key!r} is there already; {_HINT}.")
        data = _line({"key": key, "items": list(items)})
        due = time.monotonic() - self._synced >= self._sync_s
        write_line(self.path, self._file, data, self._end, sync=due)
        self._synced = time.monotonic() if due else self._synced
        self._offsets[key] = self._end
        self._end += len(data)

    def close(self) -> None:
        """Bring everything to the disk and release the lock."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._sync()
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def open_locked(path: Path, *, fresh: bool = False) -> Any:
    """A file, emptied if `fresh`, for this process alone to write lines to; its folder is made (ConfigError: a folder,
    or a file that another process is writing; DataError: it cannot be written)."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # replaced or removed before the lock
            raise OSError("another file has this name now")
    except OSError as error:
        file.close()
        raise ConfigError(f"Another process is writing to {path}; wait for it, or name another file.") from error
    if fresh:
        file.truncate(0)
    return file


def write_line(path: Path, file: Any, data: bytes, end: int, *, sync: bool = False) -> None:
    """Add a line at the end of an open file by one write (DataError: the disk refuses; the file is as it was then)."""
    try:
        if os.pwrite(file.fileno(), data, end) != len(data):
            raise OSError(28, "No space left on device")
        if sync:
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise unwritable(path, error) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write a file to; it replaces `path`, durably, when the block ends well and is removed otherwise
    (DataError: the disk refuses)."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that appears complete or not at all and is on the disk when this returns (DataError: the disk
    refuses)."""
    with atomic_path(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def unwritable(path: Path, error: Exception) -> DataError:
    """The error for a file or folder that cannot be written."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{path} cannot be written ({reason}); check space and rights, then run again.")


def differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, in words: "model.weights was 'abc', is 'abd'"."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            words
            for key in dict.fromkeys([*there, *here])
            for words in differences(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if there == here else [f"{prefix} was {there!r:.60}, is {here!r:.60}"]


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"


def _read_header(line: bytes, path: Path, purpose: str | None) -> dict[str, Any]:
    try:
        header = json.loads(line)
        schema = header["schema"]
        complete = line.endswith(b"\n") and isinstance(header["settings"], dict) and isinstance(schema, int)
    except (ValueError, KeyError, TypeError):
        complete = False
    if complete and schema != SCHEMA:
        raise DataError(
            f"{path} has schema {schema}, but this qzoom reads {SCHEMA}: use a matching version, replace it with "
            "--fresh, or convert it in a checkout of qzoom's repository with `python benchmarks/convert_stores.py`."
        )
    wanted = purpose or "what qzoom writes"
    if not complete or not {"purpose", "about"} <= set(header):
        raise DataError(
            f"{path} does not start like a file of {wanted}; name another file (an output is replaced with --fresh)."
        )
    if purpose is not None and header["purpose"] != purpose:
        raise DataError(
            f"{path} holds {header['purpose']}, not {purpose}; name another file (an output is replaced with --fresh)."
        )
    return dict(header)


def _key_of(line: bytes, where: str) -> str:
    end = line.find(_MIDDLE)
    if not line.startswith(_START) or not line.endswith(_END) or end < 0:
        raise DataError(f"{where}: not a line of this log; {_HINT}.")
    try:
        return str(json.loads(line[len(_START) - 1 : end + 1]))
    except ValueError as error:
        raise DataError(f"{where}: not a line of this log; {_HINT}.") from error
