"""A benchmark as a table: one row, one picture, one question; from the hub or from files on disk.

Columns, prompts and splits are those of lmms-eval's tasks. A row that cannot be used becomes a question that counts as
wrong and says why; only a table that cannot be opened at all is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import DataError, QZoomError
from qzoom.evaluation.records import EvalQuestion, EvalSample
from qzoom.evaluation.tasks.pictures import picture_source

__all__ = ["Benchmark", "Row", "TableTask", "option_letter", "optional_text", "text", "texts"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What is known of a benchmark before its table is read.

    Args:
        name: on the command line.
        repo: dataset id on the hub.
        config: the dataset's configuration there; None for its only one.
        split: the split that figures are published for.
        max_new_tokens: most tokens of an answer, as lmms-eval sets it.
        question: a row to its question; DataError where the row cannot be used.
        picture: the column that holds the picture.
        fields: fields that always appear among the figures.
    """

    name: str
    repo: str
    config: str | None
    split: str
    max_new_tokens: int
    question: Callable[[Row], EvalQuestion]
    picture: str = "image"
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class TableTask:
    """An opened table; see `qzoom.evaluation.records.Task`.

    Args:
        benchmark: whose table.
        rows: anything with a length whose items are rows, or the reason why a row is none.
        folder: where relative picture paths start; None where pictures come with the rows.
        origin: repository or files, split, revision and digest, as JSON values.
    """

    benchmark: Benchmark
    rows: Sequence[Any]
    folder: Path | None
    origin: dict[str, Any]

    @property
    def name(self) -> str:
        """The task's name on the command line."""
        return self.benchmark.name

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that always appear among the figures."""
        return self.benchmark.fields

    @property
    def ids(self) -> tuple[str, ...]:
        """Row numbers from 0."""
        return tuple(f"{self.name}-{number}" for number in range(len(self.rows)))

    @property
    def identity(self) -> dict[str, Any]:
        """The benchmark and where its rows came from."""
        return {"task": self.name} | self.origin

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer, as lmms-eval sets it."""
        return self.benchmark.max_new_tokens

    def sample(self, index: int) -> EvalSample:
        """One row's picture and question; with a reason where either cannot be used."""
        name = f"{self.name}-{index}"
        question = EvalQuestion("unusable", "", "")
        try:
            row = self.rows[index]
            if not isinstance(row, dict):
                raise DataError(str(row))
            question = self.benchmark.question(row)
            image, size_px = _picture(row, self.benchmark.picture, self.folder)
        except QZoomError as problem:
            return EvalSample(name, None, (0, 0), (question,), f"Row {index}: {problem}")
        return EvalSample(name, image, size_px, (question,))


def _picture(row: Row, column: str, folder: Path | None) -> tuple[Any, tuple[int, int]]:
    from qzoom.images.load import load_image

    loaded = load_image(picture_source(_cell(row, column), column, folder))
    return loaded.image, loaded.image.size


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise DataError(f"the column {column!r} is missing; there are {', '.join(map(str, row))}.")
    return row[column]


def text(row: Row, column: str) -> str:
    """A column's text.

    Raises:
        DataError: it is missing, no text or empty.
    """
    value = _cell(row, column)
    if not isinstance(value, str):
        raise DataError(f"the column {column!r} must hold a text, not {value!r:.60}.")
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
    """A column's texts; a single text counts as one.

    Raises:
        DataError: it is missing, empty or holds something else.
    """
    value = _cell(row, column)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        raise DataError(f"the column {column!r} must hold a list of texts, not {value!r:.60}.")
    return tuple(value)


def option_letter(row: Row, column: str, choices: int) -> str:
    """The letter of the right option.

    Raises:
        DataError: no letter of one of the options.
    """
    from qzoom.evaluation.letters import LETTERS

    letter = text(row, column).strip().upper()
    if len(letter) != 1 or letter not in LETTERS[:choices]:
        raise DataError(f"the column {column!r} must name one of the {choices} options, not {letter!r:.20}.")
    return letter
