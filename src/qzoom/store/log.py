"""A folder of records: JSON lines for reading and for resuming, safetensors for maps.

    store.json              schema, what the records are for, settings and provenance
    records-00.jsonl        one record a line; all records of a sample are added by one write
    tensors/                see `records.shards`

Lines are only ever added. A sample is there when its last record is; a broken end is cut off when the store is opened
for writing. Tensors are on the disk before the records that name them, so a killed writer loses the sample in flight
and nothing else. Several writers may fill one store, each with a number (and so a file) of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from qzoom.errors import ConfigError, DataError
from qzoom.store.schema import SCHEMA, Provenance, Record, content_id, from_values, record_from_values, tensor_digest
from qzoom.store.tensors import TensorFiles, write_synced

__all__ = ["RecordStore", "RecordWriter", "Stored", "start_store"]


HEADER = "store.json"
_R = TypeVar("_R", bound=Record)
_HINT = "restore it from a copy, or start over with --fresh"


@dataclass(frozen=True, slots=True)
class Stored:
    """A record in a store.

    Args:
        id: hash of its content.
        sample: what it was made for; a sample's records come together.
        record: the record.
        digests: hashes of its tensors by name.
    """

    id: str
    sample: str
    record: Record
    digests: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: str
    path: Path
    offset: int
    size: int


def start_store(
    folder: Path, purpose: str, settings: Mapping[str, Any], provenance: Provenance, *, fresh: bool = False
) -> None:
    """Make a store, or check that the one there was made with the same settings.

    Args:
        folder: of the store; made if need be.
        purpose: "regions", "gate", "mine" or the like.
        settings: everything that decides the records, as JSON values.
        provenance: what makes them.
        fresh: throw away the records that are there.

    Raises:
        ConfigError: other settings or another purpose; it names what changed.
        DataError: the folder holds something else under the store's names, or cannot be written.
    """
    wanted = json.loads(
        json.dumps(
            {"schema": SCHEMA, "purpose": purpose, "settings": dict(settings), "provenance": asdict(provenance)},
            allow_nan=False,
        )
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            _forget(folder)
        if not (folder / HEADER).exists():
            if any(folder.glob("records-*.jsonl")):
                raise DataError(f"{folder} has records but no {HEADER}; {_HINT}.")
            write_synced(folder / HEADER, (json.dumps(wanted, indent=2) + "\n").encode())
            return
    except OSError as error:
        raise _unwritable(folder, error) from error
    changed = _differences(_header(folder), wanted)
    if changed:
        raise ConfigError(
            f"{folder} holds records made in another way ({'; '.join(changed[:3])}); use --fresh to replace them, or "
            "another folder."
        )


class RecordStore:
    """The records of a folder, for reading. Reading mends nothing; an unfinished sample at the end is not seen.

    Args:
        folder: of the store.

    Raises:
        DataError: no store, a newer schema, or a damaged line; it says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = _header(folder)
        self.purpose = str(header["purpose"])
        self.settings: dict[str, Any] = header["settings"]
        self.provenance: Provenance = from_values(Provenance, header["provenance"], f"{folder / HEADER}: provenance")
        self._entries: dict[str, _Entry] = {}
        self._samples: dict[str, tuple[str, ...]] = {}
        self._files = TensorFiles(folder / "tensors")
        for path in sorted(folder.glob("records-*.jsonl")):
            self._index(path)

    @property
    def samples(self) -> dict[str, tuple[str, ...]]:
        """Ids of the records of each sample, in the order in which they were added."""
        return self._samples

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._entries

    def get(self, record_id: str) -> Stored:
        """One record.

        Raises:
            DataError: no such record.
        """
        if record_id not in self._entries:
            raise DataError(f"{self.folder} holds no record {record_id!r}.")
        entry = self._entries[record_id]
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            return _parse(file.read(entry.size), str(entry.path))[0]

    def of_kind(self, kind: type[_R]) -> Iterator[tuple[Stored, _R]]:
        """All records of one kind with what the store knows of each, in order."""
        for record_id, entry in self._entries.items():
            if entry.kind == kind.kind:
                stored = self.get(record_id)
                yield stored, cast(_R, stored.record)

    def tensor(self, stored: Stored, name: str) -> np.ndarray:
        """One tensor of a record.

        Raises:
            DataError: it is missing or was changed.
        """
        array = self._files.read(f"{stored.id}.{name}")
        if tensor_digest(array) != stored.digests.get(name):
            raise DataError(f"{self.folder}: the tensor {name} of record {stored.id} was changed; {_HINT}.")
        return array

    def _index(self, path: Path) -> None:
        for start, group in _samples_of(path):
            offset = start
            ids = []
            for line, stored in group:
                if stored.id not in self._entries:
                    self._entries[stored.id] = _Entry(stored.record.kind, path, offset, len(line))
                ids.append(stored.id)
                offset += len(line)
            sample = group[0][1].sample
            if sample in self._samples:
                raise DataError(f"{path}: the sample {sample!r} is there twice; {_HINT}.")
            self._samples[sample] = tuple(ids)


class RecordWriter:
    """Adds samples to a store; a context manager. One process at a time may hold a number.

    Args:
        folder: a store made by `start_store`.
        number: of this writer, from 0.

    Raises:
        ConfigError: another process holds this number.
        DataError: as `RecordStore`.
    """

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.folder = folder
        self._path = folder / f"records-{number:02d}.jsonl"
        try:
            self._file: BinaryIO = self._path.open("ab")
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(f"Another process is writing to {self._path}; wait for it or stop it.") from error
        self._size = _whole_length(self._path)
        self._file.truncate(self._size)
        there = RecordStore(folder)
        self.done: set[str] = set(there.samples)
        self._ids = set(there._entries)
        self._files = TensorFiles(folder / "tensors", number)
        self._files.tidy(self._ids)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, sample: str, records: Sequence[tuple[Record, Mapping[str, np.ndarray]]]) -> list[str]:
        """Add all records of one sample, each with its tensors.

        Args:
            sample: its key; a key that is there already is refused.
            records: one or more. A record that another sample has too (the same question) keeps its first place.

        Returns:
            The ids, in order.

        Raises:
            DataError: the sample is there already, tensors do not fit the schema, or the disk refuses.
        """
        if sample in self.done:
            raise DataError(f"{self.folder}: the sample {sample!r} is there already.")
        if not records:
            raise DataError(f"{self.folder}: the sample {sample!r} has no records.")
        ids, rows = [], []
        arrays: dict[str, np.ndarray] = {}
        for record, tensors in records:
            digests = {name: tensor_digest(array) for name, array in _checked(record, tensors).items()}
            record_id = content_id(record, digests)
            ids.append(record_id)
            rows.append((record_id, record, digests))
            arrays |= {f"{record_id}.{name}": array for name, array in tensors.items()}
        lines = b"".join(_line(i, len(rows), sample, row) for i, row in enumerate(rows))
        try:
            self._files.write(arrays)
            self._write(lines)
            self._files.gather()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.done.add(sample)
        self._ids.update(ids)
        return ids

    def close(self) -> None:
        """Gather what is left into a shard and let go of the file."""
        if self._file.closed:
            return
        try:
            self._files.gather(least=2)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        finally:
            self._file.close()

    def _write(self, data: bytes) -> None:
        """Add bytes durably; on failure the file is as it was."""
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            os.truncate(self._path, self._size)
            raise
        self._size += len(data)


def _forget(folder: Path) -> None:
    """Remove a store's own files, the header first, so that an interrupted removal is not taken for a store."""
    names = [folder / HEADER, *folder.glob("records-*.jsonl")]
    for pattern in ("part-*.safetensors", "shard-*.safetensors", "*.tmp"):
        names += (folder / "tensors").glob(pattern)
    for path in names:
        path.unlink(missing_ok=True)


def _header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no records ({HEADER} is missing); give the folder that labelling made."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read; {_HINT}.") from error
    if isinstance(header, dict) and isinstance(header.get("schema"), int) and header["schema"] != SCHEMA:
        raise DataError(f"{path} has schema {header['schema']}, but this qzoom reads {SCHEMA}; use a matching version.")
    if not isinstance(header, dict) or not {"schema", "purpose", "settings", "provenance"} <= set(header):
        raise DataError(f"{path} is not the header of a record store.")
    return header


def _checked(record: Record, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    found = {name: array.dtype.name for name, array in tensors.items()}
    if found != record.tensors:
        raise DataError(f"A record of kind {record.kind} takes the tensors {record.tensors}, not {found}.")
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"The tensor {name} of a record of kind {record.kind} holds values that are not finite.")
    return tensors


def _line(part: int, count: int, sample: str, row: tuple[str, Record, dict[str, str]]) -> bytes:
    record_id, record, digests = row
    line = {
        "id": record_id,
        "kind": record.kind,
        "sample": sample,
        "part": [part, count],
        "tensors": digests,
        "values": record.values(),
    }
    return (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _parse(line: bytes, where: str) -> tuple[Stored, int, int]:
    """A line as a record, its place in its sample, and the sample's size.

    Raises:
        DataError: it is not what was written.
    """
    try:
        row = json.loads(line)
        part, count = row["part"]
        sample, digests, record_id = row["sample"], row["tensors"], row["id"]
        record = record_from_values(row["kind"], row["values"], where)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a record; {_HINT}.") from error
    if content_id(record, digests) != record_id:
        raise DataError(f"{where}: the record's content does not match its id, so it was changed; {_HINT}.")
    return Stored(record_id, sample, record, digests), part, count


def _samples_of(path: Path) -> Iterator[tuple[int, list[tuple[bytes, Stored]]]]:
    """Whole samples of a file with their offsets; what is unfinished at the end is left out.

    Raises:
        DataError: a damaged line that is not at the end.
    """
    group: list[tuple[bytes, Stored]] = []
    start = offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            stored, part, count = _parse(line, f"{path}, line {number}")
            if part != len(group) or (group and group[0][1].sample != stored.sample):
                raise DataError(f"{path}, line {number}: records are out of order; {_HINT}.")
            group.append((line, stored))
            offset += len(line)
            if len(group) == count:
                yield start, group
                group, start = [], offset


def _whole_length(path: Path) -> int:
    """Bytes up to the end of the last whole sample."""
    end = 0
    for start, group in _samples_of(path):
        end = start + sum(len(line) for line, _ in group)
    return end


def _differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """What differs, in words."""
    out = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            out += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            out.append(f"{prefix}{key} was {old!r:.60}, is {new!r:.60}")
    return out


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"{folder} cannot be written ({error.strerror or error}); check space and rights, then run again.")
