"""A folder of records: logs of JSON lines with what was made, safetensors files with the maps.

    records-00.jsonl                            a log of writer 00: one line per sample, all records of it
    tensors/part-00-000000412.safetensors       tensors of one sample: "<record id>.<tensor>"
    tensors/shard-00-000001.safetensors         many parts of writer 00 in one file

    pending.json                                keys of the samples that were asked for and not there at the last start
    labelling.lock                              held by the command that labels, and by its worker processes

Several writers may fill one folder, each with a number (and so a log) of its own. Tensors are on the disk before the
records that name them, so a killed writer loses the sample in progress and nothing else; `.partial` files and tensors
that no record names are removed when the folder is next opened for writing. Of two records of one sample, in two logs,
the first counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from qzoom.errors import ConfigError, DataError
from qzoom.store.log import Log, LogWriter, open_locked, write_atomic
from qzoom.store.schema import Provenance, Record, content_id, from_values, record_from_values, tensor_digest

_PENDING, _LOCK = "pending.json", "labelling.lock"
GATHER = 256
"""Samples per shard."""
_HINT = "restore it from a copy, or start over with --fresh"
_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True, slots=True)
class Stored:
    """A record in a store."""

    id: str  # hash of its content
    sample: str
    record: Record
    digests: dict[str, str]  # hashes of its tensors by name


class StoreLock:
    """A folder of records for one labelling command alone; a context manager.

    Given to worker processes when they start, it is held until the last of them has ended, even if the command was
    killed (ConfigError: another command, or a worker of one, holds it; DataError: the folder cannot be written).
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._file = open_locked(folder / _LOCK)
        except ConfigError as error:
            raise ConfigError(
                f"Another command, or a worker process of one, is labelling into {folder}; wait for it, or name "
                "another folder."
            ) from error

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """To a worker process that is being started: the open file itself, and so the lock on it."""
        return _given_lock, (DupFd(self._file.fileno()),)


def _given_lock(file: Any) -> StoreLock:
    lock = StoreLock.__new__(StoreLock)
    lock._file = os.fdopen(file.detach(), "r+b", buffering=0)
    return lock


def start_store(
    folder: Path,
    purpose: str,
    settings: Mapping[str, Any],
    provenance: Provenance,
    *,
    added_later: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> None:
    """Make a store, or check that the one there was made with the same settings.

    Args:
        settings: everything that decides the records, as JSON values.
        added_later: further settings, which stores begun by older versions lack; such a store goes on without them.
        fresh: remove the records that are there.

    Raises:
        ConfigError: other settings or another model (it names what changed), or another process writes there.
        DataError: the folder holds something else under the store's names, or cannot be written.
    """
    if fresh:
        _clear(folder)
    elif (paths := _log_paths(folder)) and paths[0] != _log_path(folder, 0):
        raise DataError(f"{folder} has records but no {_log_path(folder, 0).name}; {_HINT}.")
    added = dict(added_later or {})
    if added and _log_paths(folder):
        with Log(_log_path(folder, 0)) as log:
            there = log.settings.get("settings", {})
            added = {name: value for name, value in added.items() if name in there}
    header = {"settings": {**settings, **added}, "provenance": asdict(provenance)}
    advice = "use --fresh to replace the records, or another folder"
    LogWriter(_log_path(folder, 0), purpose, header, fresh=fresh, advice=advice).close()


def _clear(folder: Path) -> None:
    """Remove all records and tensors, while no other process may write (ConfigError: one is writing)."""
    with ExitStack() as held:
        logs = sorted(folder.glob("records-*.jsonl"))
        for path in logs:
            held.enter_context(open_locked(path))
        for path in (*logs, *(folder / "tensors").glob("*-*.safetensors"), folder / _PENDING):
            path.unlink(missing_ok=True)


def note_pending(folder: Path, samples: Iterable[str]) -> None:
    """Write down which of these samples, and of those of earlier runs, a store does not have yet."""
    missing = _not_in(folder, dict.fromkeys([*_pending(folder), *samples]))
    write_atomic(folder / _PENDING, json.dumps(missing, ensure_ascii=False) + "\n")


def log_facts(folder: Path, number: int) -> dict[str, Any]:
    """The facts that a writer noted when it began its log; {} without records of it."""
    path = _log_path(folder, number)
    if path not in _log_paths(folder):
        return {}
    with Log(path) as log:
        return log.about if len(log) else {}


def missing_samples(folder: Path) -> int:
    """The number of samples that were asked of the runs that filled a store and that it does not have."""
    return len(_not_in(folder, _pending(folder)))


def _pending(folder: Path) -> list[str]:
    try:
        keys = json.loads((folder / _PENDING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def _not_in(folder: Path, keys: Iterable[str]) -> list[str]:
    logs = [Log(path) for path in _log_paths(folder)]
    return [key for key in keys if not any(key in log for log in logs)]


class RecordStore:
    """The records of a folder, for reading. Reading repairs nothing; a torn last line is not seen (DataError: no store,
    a newer schema, or a damaged line; it says which)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = _log_paths(folder)
        if not paths:
            raise DataError(f"{folder} holds no records (records-00.jsonl is missing); give a folder of labels.")
        self._logs = [Log(path) for path in paths]
        self._records: dict[str, tuple[str, Log, str]] = {}
        self._samples: dict[str, tuple[str, ...]] = {}
        self._files = TensorFiles(folder / "tensors")
        header = self._logs[0].settings
        self.purpose = self._logs[0].purpose
        self.settings: dict[str, Any] = header["settings"]
        self.provenance: Provenance = from_values(Provenance, header["provenance"], f"{paths[0]}: provenance")
        for log in self._logs:
            if (log.purpose, log.settings) != (self.purpose, header):
                raise DataError(f"{log.path} was made in another way than {paths[0]}; {_HINT}.")
            self._read(log)

    @property
    def samples(self) -> dict[str, tuple[str, ...]]:
        """Ids of the records of each sample, in the order in which they were added."""
        return self._samples

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._records

    def get(self, record_id: str) -> Stored:
        """One record (DataError: no such record)."""
        if record_id not in self._records:
            raise DataError(f"{self.folder} holds no record {record_id!r}.")
        _, log, sample = self._records[record_id]
        rows = log.get(sample) or []
        return next(_parse(row, sample, str(log.path)) for row in rows if row["id"] == record_id)

    def of_kind(self, kind: type[_R]) -> Iterator[tuple[Stored, _R]]:
        """All records of one kind with what the store knows of each, in order."""
        for record_id, (name, _, _) in self._records.items():
            if name == kind.kind:
                stored = self.get(record_id)
                yield stored, cast(_R, stored.record)

    def tensor(self, stored: Stored, name: str) -> np.ndarray:
        """One tensor of a record (DataError: it is missing or was changed)."""
        array = self._files.read(f"{stored.id}.{name}")
        if tensor_digest(array) != stored.digests.get(name):
            raise DataError(f"{self.folder}: the tensor {name} of record {stored.id} was changed; {_HINT}.")
        return array

    def _read(self, log: Log) -> None:
        for sample, rows in log:
            if sample in self._samples:  # two commands labelled at once
                continue
            records = [_parse(row, sample, f"{log.path}, sample {sample!r}") for row in rows]
            for stored in records:
                self._records.setdefault(stored.id, (stored.record.kind, log, sample))
            self._samples[sample] = tuple(stored.id for stored in records)


class RecordWriter:
    """Adds samples to a store; a context manager. One process at a time may hold a number (ConfigError: another process
    holds this number; DataError: as `RecordStore`). `facts`: about the writer, noted before its first record."""

    def __init__(self, folder: Path, number: int = 0, *, facts: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        with Log(_log_path(folder, 0)) as first:
            path = _log_path(folder, number)
            begins = facts is not None and (path not in _log_paths(folder) or not len(Log(path)))
            self._log = LogWriter(path, first.purpose, first.settings, about=facts, fresh=begins)
        try:
            store = RecordStore(folder)
            self.done: set[str] = set(store.samples)
            self._files = TensorFiles(folder / "tensors", number)
            self._files.tidy(store._records)
        except BaseException:
            self._log.close()
            raise

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
        rows: list[dict[str, Any]] = []
        arrays: dict[str, np.ndarray] = {}
        for record, tensors in records:
            digests = {name: tensor_digest(array) for name, array in _checked(record, tensors).items()}
            record_id = content_id(record, digests)
            rows.append({"id": record_id, "kind": record.kind, "tensors": digests, "values": record.values()})
            arrays |= {f"{record_id}.{name}": array for name, array in tensors.items()}
        self._files.write(arrays)
        self._log.append(sample, rows)
        self._files.gather()
        self.done.add(sample)
        return [row["id"] for row in rows]

    def close(self) -> None:
        """Gather what is left into a shard and release the log."""
        try:
            self._files.gather(least=2)
        finally:
            self._log.close()


class TensorFiles:
    """All tensor files of a store's folder. `writer`: number of this writer; None only reads."""

    def __init__(self, folder: Path, writer: int | None = None) -> None:
        self._folder = folder
        self._writer = writer
        self._where: dict[str, Path] = {}
        self._parts: list[Path] = []
        self._next = 0
        if folder.is_dir():
            # A part whose tensors are also in a shard was gathered but not yet removed: shards come last and win.
            for path in sorted(folder.glob("*.safetensors")):
                self._where.update(dict.fromkeys(_keys(path), path))

    def tidy(self, known: Iterable[str]) -> None:
        """Remove this writer's leftovers: unfinished files, tensors of no record, parts that a shard holds."""
        records = set(known)
        for path in self._folder.glob(f"*-{self._writer:02d}-*.partial"):
            path.unlink(missing_ok=True)
        for path in sorted(self._folder.glob(f"part-{self._writer:02d}-*.safetensors")):
            keys = _keys(path)
            held = [key for key in keys if self._where.get(key) == path and key.split(".")[0] in records]
            if held:
                self._parts.append(path)
            else:
                path.unlink()
                for key in keys:
                    if self._where.get(key) == path:
                        del self._where[key]
        numbers = [int(path.stem.split("-")[2]) for path in self._parts]
        self._next = max(numbers, default=-1) + 1

    def write(self, tensors: dict[str, np.ndarray]) -> None:
        """Write one sample's tensors, named "<record id>.<tensor>"."""
        if not tensors:
            return
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"part-{self._writer:02d}-{self._next:09d}.safetensors"
        _save(path, tensors)
        self._next += 1
        self._parts.append(path)
        self._where.update(dict.fromkeys(tensors, path))

    def gather(self, least: int = GATHER) -> None:
        """Join the parts into one shard when there are at least `least` of them."""
        if not self._parts or len(self._parts) < least:
            return
        from safetensors.numpy import load_file

        tensors: dict[str, np.ndarray] = {}
        for path in self._parts:
            tensors |= load_file(path)
        taken = [int(p.stem.split("-")[2]) for p in self._folder.glob(f"shard-{self._writer:02d}-*.safetensors")]
        shard = self._folder / f"shard-{self._writer:02d}-{max(taken, default=0) + 1:06d}.safetensors"
        _save(shard, tensors)
        self._where.update(dict.fromkeys(tensors, shard))
        for path in self._parts:
            path.unlink()
        self._parts = []

    def read(self, key: str) -> np.ndarray:
        """One tensor (DataError: no file holds it)."""
        from safetensors import safe_open

        if key not in self._where:
            raise DataError(f"{self._folder} lacks the tensor {key}; restore the missing file or label again.")
        with safe_open(self._where[key], "np") as file:
            return np.asarray(file.get_tensor(key))

    def __contains__(self, key: str) -> bool:
        return key in self._where


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    write_atomic(path, save({key: np.ascontiguousarray(value) for key, value in tensors.items()}))


def _keys(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except FileNotFoundError:
        return []  # another writer has just gathered it
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no readable safetensors file; restore it or label again with --fresh.") from error


def _log_path(folder: Path, number: int) -> Path:
    return folder / f"records-{number:02d}.jsonl"


def _log_paths(folder: Path) -> list[Path]:
    """Logs with a header; one that another writer has just created has none yet."""
    return sorted(path for path in folder.glob("records-*.jsonl") if path.stat().st_size)


def _checked(record: Record, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    dtypes = {name: array.dtype.name for name, array in tensors.items()}
    if dtypes != record.tensors:
        raise DataError(f"A record of kind {record.kind} takes the tensors {record.tensors}, not {dtypes}.")
    for name, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"The tensor {name} of a record of kind {record.kind} holds values that are not finite.")
    return tensors


def _parse(row: Any, sample: str, where: str) -> Stored:
    """A record as it was written (DataError: it is not what was written)."""
    try:
        record_id, digests = row["id"], row["tensors"]
        record = record_from_values(row["kind"], row["values"], where)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not a record; {_HINT}.") from error
    if content_id(record, digests) != record_id:
        raise DataError(f"{where}: the record's content does not match its id, so it was changed; {_HINT}.")
    return Stored(record_id, sample, record, digests)
