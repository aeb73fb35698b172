"""Exported data: Parquet rows to questions about images.

Every image is written to disk once, under a hash of its bytes, and questions keep the path, so that memory does not
grow with the data. Whole images are held out for validation, never single questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import DataError, reason_of
from qzoom.store.log import write_atomic
from qzoom.types import Box

_COLUMNS = ("id", "images", "prompt", "answer", "bbox", "choices", "letter", "extra_info")
_NEEDED = ("id", "images", "prompt", "answer")
_PLACEHOLDER = "<image>"
_BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class ExportedQuestion:
    """A question about a whole picture."""

    id: str  # of the exported item
    picture: str  # path of the original picture
    text: str  # as it is put, options included
    answer: str  # right reply: a letter for multiple choice, else the text
    box: Box | None = None  # region that it is about, original pixels; None without one
    choices: tuple[str, ...] = ()  # options in the order shown; empty for free questions
    letter: str = ""  # of the right option
    kind: str = "other"  # what it tests
    negative: bool = False  # the target is absent
    pair: str = ""  # id of its positive


@dataclass(frozen=True, slots=True)
class Split:
    """Questions to train on and questions to validate with; no picture is in both."""

    train: tuple[ExportedQuestion, ...]
    validation: tuple[ExportedQuestion, ...]


def read_split(folder: Path, pictures: Path, share: float, seed: int) -> Split:
    """Read the Parquet files of an exported folder, or of its `data`; pictures are kept in a folder of their own.

    Files whose names begin with "val" are validated with, all others (but "test") trained on; without rows in the
    former a share of the pictures is held out by the seed (DataError: no files, no questions, a missing column or a
    malformed row).
    """
    files = check_folder(folder)
    held = [path for path in files if path.name.startswith("val")]
    rest = [path for path in files if path not in held and not path.name.startswith("test")]
    pictures.mkdir(parents=True, exist_ok=True)
    train = [question for path in rest for question in _read(path, pictures)]
    validation = [question for path in held for question in _read(path, pictures)]
    if not validation and share > 0:
        out = {name for name in {q.picture for q in train} if _place(name, seed) < share}
        validation = [question for question in train if question.picture in out]
        train = [question for question in train if question.picture not in out]
    shared = {q.picture for q in train} & {q.picture for q in validation}
    if shared:
        train = [question for question in train if question.picture not in shared]
    if not train:
        raise DataError(f"{folder} holds no question to train on; export more, or hold out a smaller share.")
    return Split(tuple(train), tuple(validation))


def digest_of(questions: Sequence[ExportedQuestion]) -> str:
    """Twenty hex digits that change with any question, answer, box or picture, and with the order."""
    out = hashlib.sha256()
    for q in questions:
        content = [q.id, Path(q.picture).stem, q.text, q.answer, q.box, q.choices, q.letter, q.negative]
        out.update(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return out.hexdigest()[:20]


def check_folder(folder: Path) -> list[Path]:
    """The Parquet files of an exported folder (DataError: no folder, or none of them)."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name the folder that `qzoom distill` exported to.")
    found = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    if not found:
        raise DataError(f"{folder} holds no Parquet file; name the folder that `qzoom distill` exported to.")
    return found


def _read(path: Path, pictures: Path) -> Iterator[ExportedQuestion]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = set(file.schema_arrow.names)
        missing = [name for name in _NEEDED if name not in there]
        if missing:
            raise DataError(f"{path} has no column {', '.join(missing)}; export the data again.")
        columns = [name for name in _COLUMNS if name in there]
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _question(row, f"{path}, row {number}", path.parent, pictures)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({reason_of(error)}); export it again.") from error


def _question(row: Mapping[str, Any], where: str, folder: Path, pictures: Path) -> ExportedQuestion:
    extra = row.get("extra_info") or {}
    if isinstance(extra, str):
        try:
            extra = json.loads(extra)
        except ValueError as error:
            raise DataError(f"{where}: extra_info is not valid JSON.") from error
    choices = tuple(str(choice) for choice in row.get("choices") or ())
    letter, answer = str(row.get("letter") or ""), row["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: the answer is empty.")
    if choices and not letter:
        letter = answer.strip()
    if choices and (len(letter) != 1 or not 0 <= ord(letter) - ord("A") < len(choices)):
        raise DataError(f"{where}: {letter!r} is the letter of none of its {len(choices)} choices.")
    return ExportedQuestion(
        id=str(row["id"]),
        picture=_keep(row["images"], where, folder, pictures),
        text=_text(row["prompt"], where),
        answer=letter if choices else answer.strip(),
        box=_box(row.get("bbox"), where),
        choices=choices,
        letter=letter,
        kind=str(extra.get("kind") or "other"),
        negative=bool(extra.get("negative") or False),
        pair=str(extra.get("pair") or ""),
    )


def _text(prompt: Any, where: str) -> str:
    """Text of the last user turn, without a placeholder for the picture."""
    turns = [m for m in prompt or () if isinstance(m, Mapping) and m.get("role") == "user"]
    if not turns:
        raise DataError(f"{where}: the prompt has no user turn.")
    content = turns[-1].get("content")
    if not isinstance(content, str):
        parts = [part for part in content or () if isinstance(part, Mapping)]
        content = "".join(str(part.get("text") or "") for part in parts if part.get("type", "text") == "text")
    text = content.replace(_PLACEHOLDER, "", 1).strip()
    if not text:
        raise DataError(f"{where}: the question is empty.")
    return text


def _box(value: Any, where: str) -> Box | None:
    if value is None or len(value) == 0:
        return None
    if len(value) != 4:
        raise DataError(f"{where}: bbox holds {len(value)} numbers instead of four.")
    x0, y0, x1, y1 = (round(float(v)) for v in value)
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"{where}: the box {(x0, y0, x1, y1)} is empty.")
    return x0, y0, x1, y1


def _keep(images: Any, where: str, folder: Path, pictures: Path) -> str:
    """Path of the row's one picture; bytes are written where they are not yet."""
    if not images or len(images) != 1:
        raise DataError(f"{where}: expected one picture, found {len(images or ())}.")
    image = images[0]
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (None, image)
    if data:
        target = pictures / hashlib.sha256(data).hexdigest()[:32]
        if not target.exists():
            write_atomic(target, data)
        return str(target)
    if not path:
        raise DataError(f"{where}: the picture has neither bytes nor a path.")
    found = Path(str(path)) if Path(str(path)).is_absolute() else folder / str(path)
    if not found.is_file():
        raise DataError(f"{where}: the picture {path} is missing.")
    return str(found)


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that only the picture and the seed decide."""
    digest = hashlib.sha256(f"{seed}/{Path(name).name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
