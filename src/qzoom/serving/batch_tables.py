"""Batch jobs from and to Parquet: rows become lines before the run, and lines become rows after it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import ConfigError, DataError
from qzoom.store.log import atomic_path, open_locked, unwritable

if TYPE_CHECKING:
    from qzoom.serving.batch import AnswerFile

_ROWS = 1024
_ASKED = ("question", "turns", "questions")


def is_table(path: Path) -> bool:
    """Whether a file is Parquet, by its name."""
    return path.suffix == ".parquet"


@contextmanager
def open_table(source: Path, output: Path) -> Iterator[Path]:
    """The input as lines: itself, or (Parquet) a file beside the output that this run alone writes and removes.

    Columns are those of a line: `custom_id` and `body` (JSON text or a struct), or `id`, `image` and one of `question`,
    `turns` and `questions`, where `image` is a path, bytes, or a struct of `bytes` and `path` as `datasets` writes it.

    Raises:
        ConfigError: pyarrow is not installed, or another process does the same job.
        DataError: the input cannot be read, lacks these columns or holds what JSON lacks, or the lines cannot be
            written.
    """
    if not is_table(source):
        yield source
        return
    lines = output.with_name(f"{output.name}.input.jsonl")
    lock = open_locked(lines, fresh=True)
    try:
        _write_lines(source, lines)
        yield lines
    finally:
        lines.unlink(missing_ok=True)
        lock.close()


def _write_lines(source: Path, lines: Path) -> None:
    try:
        with lines.open("w", encoding="utf-8") as file:
            for number, row in enumerate(_rows(source), start=1):
                try:
                    file.write(json.dumps(_line(row, source)) + "\n")
                except TypeError as error:
                    raise DataError(f"{source}, row {number} cannot be a line of JSON ({error}); mend it.") from error
    except OSError as error:
        raise unwritable(lines, error) from error


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    parquet = _parquet()
    try:
        table = parquet.ParquetFile(source)
        names = set(table.schema_arrow.names)
        if not names >= {"custom_id", "body"} and not (names >= {"id", "image"} and names & set(_ASKED)):
            raise DataError(
                f"{source} has the columns {', '.join(sorted(names))}; a batch needs custom_id and body, or id, image "
                f"and one of {', '.join(_ASKED)}."
            )
        for batch in table.iter_batches(_ROWS):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{source} is no readable Parquet file ({str(error).splitlines()[0][:120]}).") from error


def _line(row: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A row as a line; pictures inside the table become data URLs."""
    if "custom_id" in row:
        body = _given(row["body"])
        values = {key: row[key] for key in ("custom_id", "method", "url") if row.get(key) is not None}
        try:
            return values | {"body": json.loads(body) if isinstance(body, str) else body}
        except ValueError:
            return values | {"body": body}
    image = row["image"]
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(data, bytes):
        image = "data:application/octet-stream;base64," + base64.b64encode(data).decode("ascii")
    elif isinstance(image, Mapping):
        image = image.get("path")
    if isinstance(image, str) and "\0" not in image and not image.startswith("data:"):
        image = str((source.parent / image).resolve())
    name = None if row["id"] is None else str(row["id"])
    return {"id": name, "image": image} | {key: _given(row[key]) for key in _ASKED if row.get(key) is not None}


def _given(value: Any) -> Any:
    """The value without the nulls with which Arrow fills the fields that a struct lacks."""
    if isinstance(value, Mapping):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def finish_table(answers: AnswerFile, output: Path) -> None:
    """Write all answers as Parquet: custom_id, status, text, finish_reason, zoomed, boxes, and the whole record."""
    import pyarrow as pa

    parquet = _parquet()
    boxes = pa.list_(pa.list_(pa.int64()))
    kinds = {"custom_id": pa.string(), "status": pa.int64(), "text": pa.string(), "finish_reason": pa.string()}
    kinds |= {"zoomed": pa.bool_(), "boxes": boxes, "error": pa.string(), "record": pa.string()}
    schema = pa.schema(list(kinds.items()))
    rows: list[dict[str, Any]] = []
    with atomic_path(output) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for record in answers.records():
            rows.append(_row(record))
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    response, fault = record["response"] or {}, record["error"] or {}
    body = response.get("body") or {}
    choice = (body.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    zoom = message.get("qzoom") or {}
    return {
        "custom_id": record["custom_id"],
        "status": response.get("status_code"),
        "text": message.get("content"),
        "finish_reason": choice.get("finish_reason"),
        "zoomed": (zoom.get("gate") or {}).get("zoomed"),
        "boxes": [region["box"] for region in zoom.get("regions") or ()],
        "error": fault.get("message") or (body.get("error") or {}).get("message"),
        "record": json.dumps(record),
    }


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet files need pyarrow; install it with: pip install pyarrow.") from error
    return pyarrow.parquet
