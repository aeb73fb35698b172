"""The file of an evaluation's raw answers: one JSON object a line, the run's settings first.

All questions of a picture are appended by one write that is flushed to disk, so a killed run loses at most the picture
in flight. A rerun reads what is there, drops a broken end, and continues; with other settings it refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qzoom.data.samples import AnswerRow
from qzoom.errors import ConfigError, DataError

__all__ = ["AnswerFile", "read_answers"]

SCHEMA = 1


class AnswerFile:
    """Rows of one run, kept in a file.

    Args:
        path: the file; its folder is made.
        settings: what decides the answers, as JSON values.
        about: what a reader may want to know beside them; it may change between reruns.
        fresh: throw away what is there.

    Raises:
        ConfigError: the file holds answers of another run.
        DataError: the file holds something else.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, about: dict[str, Any] | None = None, fresh: bool = False
    ) -> None:
        self.path = path
        self._about = about or {}
        self._settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file for the answers.")
        keep = not fresh and path.exists() and path.stat().st_size > 0
        self.rows = self._resume() if keep else self._start()

    def pictures(self) -> set[str]:
        """Ids of the pictures whose questions are all answered."""
        return {row.picture for row in self.rows}

    def append(self, rows: Sequence[AnswerRow]) -> None:
        """Add all rows of one or more pictures, picture by picture."""
        text = "".join(_line(row.to_dict()) for row in rows)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(rows)

    def _start(self) -> list[AnswerRow]:
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        partial.write_text(_line(self._header()), encoding="utf-8", newline="\n")
        os.replace(partial, self.path)
        return []

    def _header(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "about": self._about, "settings": self._settings}

    def _resume(self) -> list[AnswerRow]:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        lines = data[:end].split(b"\n")[:-1]
        self._check_header(lines[0] if lines else b"")
        rows: list[AnswerRow] = []
        whole, length = 0, len(lines[0]) + 1
        kept = length
        for number, line in enumerate(lines[1:], start=2):
            rows.append(self._row(line, number, rows, whole))
            length += len(line) + 1
            if len(rows) - whole == rows[-1].count:
                whole, kept = len(rows), length
        if kept < len(data):
            with self.path.open("r+b") as file:
                file.truncate(kept)
        return rows[:whole]

    def _check_header(self, line: bytes) -> None:
        header = _read_header(line)
        if header is None:
            raise DataError(
                f"{self.path} does not start like answers of this version of qzoom; name another file or use --fresh "
                "to replace it."
            )
        changed = _differences(header["settings"], self._settings)
        if changed:
            raise ConfigError(
                f"{self.path} holds the answers of another run ({'; '.join(changed[:3])}); name another file or use "
                "--fresh to replace it."
            )

    def _row(self, line: bytes, number: int, rows: list[AnswerRow], whole: int) -> AnswerRow:
        """The next row; rows of a picture follow each other and no picture comes twice."""
        where = f"{self.path}, line {number}"
        hint = "name another file or use --fresh to replace it."
        try:
            row = AnswerRow.from_dict(json.loads(line))
        except (ValueError, DataError) as error:
            raise DataError(f"{where}: {error}; {hint}") from error
        started = rows[whole:]
        if row.index != len(started) or any(r.picture != row.picture for r in started):
            raise DataError(f"{where}: the answers about {row.picture!r} are out of order; {hint}")
        if any(r.picture == row.picture for r in rows[:whole]):
            raise DataError(f"{where}: the picture {row.picture!r} was answered twice; {hint}")
        return row


def read_answers(path: Path) -> tuple[dict[str, Any], list[AnswerRow]]:
    """Header ("settings", "about") and rows of a file that a run wrote, to score it again; it is not changed.

    A broken last picture, as a killed run leaves it, is left out.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name a file that `qzoom eval -o` wrote."
        ) from error
    header = _read_header(lines[0])
    if header is None:
        raise DataError(f"{path} does not start like answers of this version of qzoom; name a file of its own.")
    rows: list[AnswerRow] = []
    whole = 0
    for number, line in enumerate(lines[1:-1], start=2):
        try:
            rows.append(AnswerRow.from_dict(json.loads(line)))
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}; remove the file or ask again with --fresh.") from error
        whole = len(rows) if rows[-1].index + 1 == rows[-1].count else whole
    return header, rows[:whole]


def _read_header(line: bytes) -> dict[str, Any] | None:
    """The first line of an answer file; None if it is another's."""
    try:
        header = json.loads(line)
        known = isinstance(header, dict) and header["schema"] == SCHEMA and isinstance(header["settings"], dict)
    except (ValueError, KeyError):
        known = False
    return header if known else None


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs, in words: "zoom was 'never', is 'auto'"."""
    out = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            out += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            out.append(f"{prefix}{key} was {old!r:.60}, is {new!r:.60}")
    return out
