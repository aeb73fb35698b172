"""Question files beside their pictures, `DIR/NAME.jsonl`: scanned receipts with totals, dates and company names, and
any other pictures whose answers' places are known.

One JSON object a line: `id`, `image` (path from DIR), `width`, `height` (pixels), and `questions`, a list of `field`,
`question`, `answer` and `boxes` (xyxy in pixels, possibly none). Files that are not receipts may have any `field`, and
`negative` where what is asked for is not in the picture. The whole file is checked before the first question is asked;
every complaint names the file and the line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import DataError
from qzoom.evaluation.records import EvalQuestion, EvalSample
from qzoom.types import Box

__all__ = ["RECEIPT_FIELDS", "ReceiptsTask", "read_questions", "read_receipts"]

RECEIPT_FIELDS = ("total", "date", "company")
_RECORD: dict[str, type] = {"id": str, "image": str, "width": int, "height": int, "questions": list}
_QUESTION: dict[str, type] = {"field": str, "question": str, "answer": str, "boxes": list}
_OPTIONAL: dict[str, type] = {"negative": bool}
_KINDS = {str: "a text", int: "a whole number", list: "a list", bool: "true or false"}


@dataclass(frozen=True, slots=True, eq=False)
class ReceiptsTask:
    """A checked question file; see `qzoom.evaluation.records.Task`."""

    samples: tuple[EvalSample, ...]
    split: str
    sha256: str
    name: str = "receipts"
    fields: tuple[str, ...] = RECEIPT_FIELDS

    @property
    def ids(self) -> tuple[str, ...]:
        """The pictures' ids."""
        return tuple(sample.id for sample in self.samples)

    @property
    def identity(self) -> dict[str, Any]:
        """Split and digest of the question file."""
        return {"task": self.name, "split": self.split, "sha256": self.sha256}

    def sample(self, index: int) -> EvalSample:
        """One picture and its questions."""
        return self.samples[index]


def read_receipts(folder: Path, split: str) -> ReceiptsTask:
    """Read and check `folder/split.jsonl`.

    Raises:
        DataError: the file or a picture is missing, or a line cannot be used; it says which.
    """
    samples, sha256 = _read(folder, split, RECEIPT_FIELDS)
    return ReceiptsTask(samples, split, sha256)


def read_questions(folder: Path, split: str) -> ReceiptsTask:
    """The same for a file about any pictures: every `field` is welcome, and `negative` may mark a question.

    Raises:
        DataError: as in `read_receipts`.
    """
    samples, sha256 = _read(folder, split, None)
    return ReceiptsTask(samples, split, sha256, "questions", ())


def _read(folder: Path, split: str, fields: tuple[str, ...] | None) -> tuple[tuple[EvalSample, ...], str]:
    """The checked pictures and the file's digest; `fields` are those allowed, None allows all."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl"))) if folder.is_dir() else ""
        hint = f"splits there: {there}." if there else "name the folder that holds NAME.jsonl with --data."
        raise DataError(f"{path}: no such question file; {hint}")
    data = path.read_bytes()
    samples: list[EvalSample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        sample = _sample(_parse(line, where), folder, where, fields)
        if sample.id in seen:
            raise DataError(f"{where}: the id {sample.id!r} is already on line {seen[sample.id]}; ids must differ.")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: no questions in it; expected one JSON object a line.")
    return tuple(samples), hashlib.sha256(data).hexdigest()


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove the line.") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply; expected one flat record.") from error


def _checked(value: Any, kinds: dict[str, type], where: str, optional: dict[str, type] | None = None) -> dict[str, Any]:
    """The mapping, with all keys of `kinds` and perhaps some of `optional`, each of its type."""
    known = kinds | (optional or {})
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with {', '.join(kinds)}, not {type(value).__name__}.")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
            raise DataError(f"{where}: unknown field {key!r}; {hint}")
    for key, kind in known.items():
        if key not in value:
            if key in kinds:
                raise DataError(f"{where}: {key!r} is missing.")
            continue
        if not isinstance(value[key], kind) or (isinstance(value[key], bool) and kind is not bool):
            raise DataError(f"{where}: {key!r} must be {_KINDS[kind]}, not {value[key]!r:.60}.")
        if kind is str and not value[key].strip():
            raise DataError(f"{where}: {key!r} is empty.")
    return value


def _sample(value: Any, folder: Path, where: str, fields: tuple[str, ...] | None) -> EvalSample:
    record = _checked(value, _RECORD, where)
    size_px = (record["width"], record["height"])
    if min(size_px) < 1:
        raise DataError(f"{where}: width and height must be positive, not {size_px[0]} x {size_px[1]}.")
    if not record["questions"]:
        raise DataError(f"{where}: no questions; give at least one or remove the line.")
    questions = tuple(
        _question(item, size_px, f"{where}, question {i}", fields)
        for i, item in enumerate(record["questions"], start=1)
    )
    picture = _picture(folder, record["image"], where)
    _check_size(picture, size_px, where)
    return EvalSample(record["id"], picture, size_px, questions)


def _question(value: Any, size_px: tuple[int, int], where: str, fields: tuple[str, ...] | None) -> EvalQuestion:
    item = _checked(value, _QUESTION, where, None if fields else _OPTIONAL)
    if fields and item["field"] not in fields:
        raise DataError(f"{where}: unknown field {item['field']!r}; known: {', '.join(fields)}.")
    boxes = tuple(_box(box, size_px, where) for box in item["boxes"])
    return EvalQuestion(
        item["field"], item["question"], item["answer"], boxes, negative=bool(item.get("negative", False))
    )


def _box(value: Any, size_px: tuple[int, int], where: str) -> Box:
    whole = isinstance(value, list) and len(value) == 4 and all(type(side) is int for side in value)
    if not whole or not (0 <= value[0] < value[2] <= size_px[0] and 0 <= value[1] < value[3] <= size_px[1]):
        raise DataError(
            f"{where}: the box {value!r:.60} is not [x0, y0, x1, y1] in whole pixels inside the picture of "
            f"{size_px[0]} x {size_px[1]} px."
        )
    return value[0], value[1], value[2], value[3]


def _picture(folder: Path, name: str, where: str) -> Path:
    given = Path(name)
    if given.is_absolute() or ".." in given.parts or "\0" in name:
        raise DataError(f"{where}: the picture {name!r} must be a path inside the data folder.")
    path = folder / given
    if not path.is_file():
        raise DataError(f"{where}: the picture {name!r} is not in {folder}; put it there or remove the line.")
    return path


def _check_size(path: Path, size_px: tuple[int, int], where: str) -> None:
    """Boxes only fit a picture of the stated size. A file that is no picture fails later, as a wrong answer."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:
        return
    real = (height, width) if turned else (width, height)
    if real != size_px:
        raise DataError(
            f"{where}: the picture {path.name!r} is {real[0]} x {real[1]} px, not the stated {size_px[0]} x "
            f"{size_px[1]}, so boxes would not fit; correct width and height."
        )
