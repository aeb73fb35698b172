"""A benchmark as a table with one image and one question per row, read by `datasets` from the hub or from a folder.

A folder holds SPLIT.parquet, SPLIT-*.parquet (also below data/), SPLIT.jsonl, or what `save_to_disk` wrote; for several
benchmarks, each has a subfolder of its name. Columns, prompts and splits are those of lmms-eval's tasks. Images stay
encoded until their question is asked. A row that cannot be used becomes a question that counts as wrong and records
the reason; only a table that cannot be opened at all is an error.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.errors import ConfigError, DataError, QZoomError, may_pass, reason_of
from qzoom.images.load import load_image
from qzoom.scoring.letters import LETTERS

_LONGEST_PATH = 1024


def picture_source(value: Any, column: str, folder: Path | None) -> bytes | Path:
    """The encoded picture, or the path of its file.

    Args:
        value: a table's cell.
        folder: relative paths start here and may not leave it; None where only the hub's own cache is read.

    Raises:
        DataError: nothing that could be a picture, or a path that leaves the folder.
    """
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise DataError(f"the column {column!r} holds a list of {len(value)} pictures: expected exactly one.")
        (value,) = value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise DataError(
            f"the column {column!r} holds no picture: expected bytes, a path or base64, not {_kind_of(value)}."
        )
    if value.startswith("data:"):
        return _decoded(value.partition(",")[2], column)
    if len(value) <= _LONGEST_PATH and "\0" not in value:
        path = Path(value)
        if folder is None:
            if _is_file(path):
                return path
        elif path.is_absolute() or ".." in path.parts:
            raise DataError(f"the picture {value!r:.80} must be a path inside the data folder.")
        elif _is_file(folder / path):
            return folder / path
        elif path.suffix:
            missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), value)  # it may come back
            raise DataError(f"the picture {value!r:.80} is not in {folder}.") from missing
    return _decoded(value, column)


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a name that is too long for one, as base64 is, names none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _kind_of(value: Any) -> str:
    """A cell in words; contents of bytes and containers are never shown."""
    if value is None:
        return "nothing"
    if not value and isinstance(value, str | bytes):
        return "an empty value"
    return f"{value}" if isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def _decoded(value: str, column: str) -> bytes:
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise DataError(f"the column {column!r} is neither the path of a picture nor base64: {value!r:.40}.")
    return data


Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is known of a benchmark before its table is read."""

    name: str
    repo: str  # dataset id on the hub
    config: str | None  # the dataset's configuration there; None for its only one
    split: str  # the split that figures are published for
    max_new_tokens: int  # most tokens of an answer, as lmms-eval sets it
    question: Callable[[Row], SampleQuestion]  # a row to its question; DataError where the row cannot be used
    picture: str = "image"  # the column that holds the picture
    fields: tuple[str, ...] = ()


def _task(benchmark: Benchmark, rows: Sequence[Any], folder: Path | None, origin: dict[str, Any]) -> Task:
    """An opened table as a task.

    Args:
        rows: anything with a length whose items are rows, or the reason why a row is none.
        folder: where relative picture paths start; None where pictures come with the rows.
        origin: repository or files, split, revision and digest, as JSON values.
    """

    def sample(number: int) -> Sample:
        name, question = f"{benchmark.name}-{number}", SampleQuestion("unusable", "", "")
        try:
            row = rows[number]
            if not isinstance(row, dict):
                raise DataError(str(row))
            question = benchmark.question(row)
            column = benchmark.picture
            image = load_image(picture_source(_cell(row, column), column, folder)).image
        except QZoomError as problem:
            return Sample(name, None, (0, 0), (question,), f"Row {number}: {problem}", may_pass(problem))
        return Sample(name, image, image.size, (question,))

    def shipped_crop(number: int) -> bytes | Path:
        row, column = rows[number], "crop_image"
        if not isinstance(row, dict) or column not in row:
            raise DataError("No crop came with this question; give crop_scale as a number or 'fit'.")
        return picture_source(row[column], column, folder)

    return Task(
        benchmark.name,
        tuple(f"{benchmark.name}-{number}" for number in range(len(rows))),
        {"task": benchmark.name} | origin,
        sample,
        benchmark.fields,
        benchmark.max_new_tokens,
        shipped_crop,
    )


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise DataError(f"the column {column!r} is missing; there are {', '.join(map(str, row))}.")
    return row[column]


def text(row: Row, column: str) -> str:
    """A column's text (DataError: it is missing, no text or empty)."""
    value = _cell(row, column)
    if not isinstance(value, str):
        raise DataError(f"the column {column!r} must hold a text, not {_kind_of(value)}.")
    if not value.strip():
        raise DataError(f"the column {column!r} is empty.")
    return value


def optional_text(row: Row, column: str) -> str | None:
    """A column's text or number as text; None where it is missing or empty."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return None
    return str(value)


def texts(row: Row, column: str) -> tuple[str, ...]:
    """A column's texts; a single text counts as one (DataError: it is missing, empty or holds something else)."""
    value = _cell(row, column)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"the column {column!r} must hold a list of texts, not {_kind_of(value)}.")
    return tuple(value)


def option_letter(row: Row, column: str, choices: int) -> str:
    """The letter of the right option (DataError: no letter of one of the options)."""
    letter = text(row, column).strip().upper()
    if len(letter) != 1 or letter not in LETTERS[:choices]:
        raise DataError(f"the column {column!r} must name one of the {choices} options, not {letter!r:.20}.")
    return letter


def open_table(
    benchmark: Benchmark, *, data: Path | None = None, split: str | None = None, revision: str | None = None
) -> Task:
    """The benchmark's table.

    Args:
        data: folder of its files; None reads the hub.
        revision: branch, tag or commit of the dataset on the hub.

    Raises:
        ConfigError: the `datasets` library is missing, or a revision of files on disk.
        DataError: no such table.
    """
    split = split or benchmark.split
    if data is None:
        rows = _load(benchmark.repo, benchmark.repo, name=benchmark.config, split=split, revision=revision)
        origin = {"source": benchmark.repo, "config": benchmark.config, "split": split, "revision": revision}
        return _task(benchmark, rows, None, origin | {"fingerprint": str(rows._fingerprint)})
    if revision is not None:
        raise ConfigError("A data revision names a state of the hub; leave it out with a local folder.")
    for base in _bases(benchmark, data):
        files = _parquet(base, split)
        if files:
            rows = _load("parquet", str(base), data_files=[str(file) for file in files], split="train")
            return _task(benchmark, rows, base, _origin(files, split))
        lines = base / f"{split}.jsonl"
        if lines.is_file():
            return _task(benchmark, _read_lines(lines), base, _origin([lines], split))
        for saved in (base / split, base):
            if (saved / "state.json").is_file():
                return _task(benchmark, _from_disk(saved), base, _origin(sorted(saved.glob("*.arrow")), split))
    raise DataError(
        f"{data}: no table of {benchmark.name} with the split {split!r}; put {split}.parquet or {split}.jsonl into it "
        f"or into its folder {benchmark.name}."
    )


def _bases(benchmark: Benchmark, data: Path) -> list[Path]:
    own = data / benchmark.name
    bases = [own, data]
    if benchmark.config:
        bases = [own / benchmark.config, own, data / benchmark.config, data]
    return [base for base in bases if base.is_dir()]


def _parquet(base: Path, split: str) -> list[Path]:
    for folder in (base, base / "data"):
        whole = folder / f"{split}.parquet"
        files = [whole] if whole.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
        if files:
            return files
    return []


def _origin(files: list[Path], split: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return {"split": split, "sha256": digest.hexdigest()}


def _read_lines(path: Path) -> list[Any]:
    """One row a line; a line that is no object becomes the reason why."""
    rows: list[Any] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            row = f"line {number} of {path.name} is not JSON ({type(error).__name__}); mend or remove it."
        rows.append(row if isinstance(row, dict | str) else f"line {number} of {path.name} is no object.")
    if not rows:
        raise DataError(f"{path}: no rows in it; expected one JSON object a line.")
    return rows


def _load(path: str, shown: str, **how: Any) -> Any:
    datasets = _datasets()
    if "data_files" in how and not _writable(Path(datasets.config.HF_DATASETS_CACHE)):
        how["cache_dir"] = _temporary_cache().name
    try:
        return _undecoded(datasets.load_dataset(path, **how))
    except Exception as error:
        reason = f"{type(error).__name__}: {reason_of(error, 200)}"
        raise DataError(
            f"The table {shown!r} could not be opened ({reason}); check its name, the split and the network, or name a "
            "local folder with --data."
        ) from error


def _writable(folder: Path) -> bool:
    """Whether files can be written into a folder, or into one that it would be made in."""
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


@cache
def _temporary_cache() -> tempfile.TemporaryDirectory[str]:
    """A cache of this process alone, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="qzoom-datasets-")


def _from_disk(folder: Path) -> Any:
    try:
        return _undecoded(_datasets().load_from_disk(str(folder)))
    except Exception as error:
        raise DataError(f"{folder}: not a table that `datasets` saved ({reason_of(error, 200)}).") from error


def _undecoded(table: Any) -> Any:
    """The table with its pictures as stored, so that one damaged picture spoils one row only."""
    for name, feature in table.features.items():
        stored = _undecoded_feature(feature)
        if stored is not feature:
            table = table.cast_column(name, stored)
    return table


def _undecoded_feature(feature: Any) -> Any:
    """A column's type with pictures as bytes and path, also in lists; other types are returned as they are."""
    image = _datasets().Image
    if isinstance(feature, image):
        return image(decode=False)
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if not isinstance(inner, image):
        return feature
    stored = image(decode=False)
    return [stored] if isinstance(feature, list) else type(feature)(stored)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Benchmarks are read by the datasets library: pip install 'qzoom[eval]'.") from error
    return datasets
