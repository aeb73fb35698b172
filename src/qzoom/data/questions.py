"""The user's questions: one JSON object a line, checked before anything is computed.

    {"id": "q1", "image": "scans/3.jpg", "question": "What is the date?", "answer": "2024-03-01"}
    {"id": "q2", "image": "scans/3.jpg", "turns": [{"question": "Who signed?"}, {"question": "Where?"}]}

`id`, `image` and either `question` or `turns` are needed. `answer` is a text or a list of texts, `boxes` a list of
[x0, y0, x1, y1] in pixels, `mode` is "text" or "natural", `source` any text. Paths start from the file's folder.
Drawn pictures and receipts come in the same form from names: "documents:FIRST:COUNT", "scenes:FIRST:COUNT",
"receipts:FOLDER:SPLIT".

Question files beside their pictures, `DIR/NAME.jsonl`: scanned receipts with totals, dates and company names, and
any other pictures whose answers' places are known.

One JSON object a line: `id`, `image` (path from DIR), `width`, `height` (pixels), and `questions`, a list of `field`,
`question`, `answer` and `boxes` (xyxy in pixels, possibly none). Files that are not receipts may have any `field`, and
`negative` where what is asked for is not in the picture. The whole file is checked before the first question is asked;
every complaint names the file and the line.

The user's question file as something to be asked: its pictures with all their questions, its digest, its answers.

The file is the one that `qzoom.data.questions` reads. Questions about the same picture share its coarse look; the
turns of a conversation are asked one by one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qzoom.data.samples import EvalQuestion, EvalSample
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.store.schema import Box4, Question, Turn
from qzoom.types import Box

if TYPE_CHECKING:
    from qzoom.images.load import LoadedImage

__all__ = [
    "DRAWN",
    "RECEIPT_FIELDS",
    "QuestionSet",
    "ReceiptsTask",
    "UserQuestions",
    "drawn_numbers",
    "load_picture",
    "open_questions",
    "read_calibration_questions",
    "read_questions",
    "read_receipt_questions",
    "read_receipts",
]


_FIELDS = ("id", "image", "question", "answer", "boxes", "turns", "mode", "source")
_TURN_FIELDS = ("question", "answer", "boxes")
DRAWN = ("documents", "scenes")


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Checked questions.

    Args:
        questions: those that can be used, in order.
        skipped: (line number, reason) of those that cannot, when they were to be skipped.
    """

    questions: tuple[Question, ...]
    skipped: tuple[tuple[int, str], ...] = ()


def open_questions(names: list[str], *, skip_bad: bool = False, per_picture: int = 4, seed: int = 0) -> QuestionSet:
    """The questions of several files or drawn sets together.

    Args:
        names: paths of JSONL files, or names as in this module's text.
        skip_bad: leave out and count lines that cannot be used, instead of stopping at the first.
        per_picture: most questions about a drawn picture.
        seed: which of them.

    Raises:
        DataError: a file or a line cannot be used; it says which.
        ConfigError: a name that means nothing.
    """
    questions: list[Question] = []
    skipped: list[tuple[int, str]] = []
    for name in names:
        kind, _, rest = name.partition(":")
        if kind in DRAWN and rest:
            questions += _drawn(kind, rest, per_picture, seed)
        elif kind == "receipts" and rest:
            questions += _receipts(rest)
        else:
            found = read_questions(Path(name), skip_bad=skip_bad)
            questions += found.questions
            skipped += found.skipped
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if (question.source, question.name) in seen:
            raise DataError(f"The question {question.name!r} of {question.source!r} comes from two of the given sets.")
        seen.add((question.source, question.name))
    return QuestionSet(tuple(questions), tuple(skipped))


def read_questions(path: Path, *, skip_bad: bool = False) -> QuestionSet:
    """Read and check a question file.

    Args:
        path: of the JSONL file.
        skip_bad: as in `open_questions`.

    Raises:
        DataError: the file cannot be read or holds nothing to use, or (unless skipped) a malformed line, a missing
            picture, an id used twice, an unknown field, or a value of the wrong type; it names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL file of questions.") from error
    questions: list[Question] = []
    skipped: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            question = _question(_parse(line, where), path, where)
            if question.name in seen:
                raise DataError(f"{where}: the id {question.name!r} is already on line {seen[question.name]}.")
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append((number, str(error)))
            continue
        seen[question.name] = number
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: no questions that can be used; expected one JSON object a line.")
    return QuestionSet(tuple(questions), tuple(skipped))


def load_picture(question: Question, images: Path | None = None) -> LoadedImage:
    """The picture of a question, drawn or read.

    Args:
        question: whose picture.
        images: folder that paths start from instead of the one noted in the record, for data that has moved.

    Raises:
        ImageError: it is missing or cannot be decoded.
    """
    from qzoom.images.load import load_image

    kind, _, number = question.image.partition(":")
    if kind in DRAWN and number.isdigit():
        return load_image(_render(kind)(int(number)).image)
    root = images if images is not None else Path(question.root)
    path = root / question.image
    if not path.is_file():
        raise ImageError(f"The picture {path} of question {question.name!r} is missing; name its folder or restore it.")
    return load_image(path)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove the line.") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not a flat JSON record; mend or remove the line.") from error


def _question(value: Any, path: Path, where: str) -> Question:
    _known(value, _FIELDS, where)
    name, image = (_text(value, key, where) for key in ("id", "image"))
    if ("question" in value) == ("turns" in value):
        raise DataError(f"{where}: give either 'question' or 'turns'.")
    if "turns" in value:
        stray = [key for key in ("answer", "boxes") if key in value]
        if stray or not isinstance(value["turns"], list) or not value["turns"]:
            what = f"{stray[0]!r} belongs into each of the turns" if stray else "'turns' must be a list of questions"
            raise DataError(f"{where}: {what}.")
        turns = tuple(_turn(item, f"{where}, turn {i}") for i, item in enumerate(value["turns"], start=1))
    else:
        turns = (_turn({key: value[key] for key in _TURN_FIELDS if key in value}, where),)
    mode = value.get("mode", "text")
    if mode not in ("text", "natural"):
        raise DataError(f"{where}: 'mode' must be text or natural, not {mode!r:.60}.")
    source = value.get("source", path.stem)
    if not isinstance(source, str):
        raise DataError(f"{where}: 'source' must be a text, not {source!r:.60}.")
    if "\0" in image:
        raise DataError(f"{where}: 'image' is no path.")
    if not (path.parent / image).is_file():
        raise DataError(f"{where}: the picture {image!r} is not in {path.parent}; put it there or remove the line.")
    return Question(name, image, turns, mode, source, str(path.parent.resolve()))


def _turn(value: Any, where: str) -> Turn:
    _known(value, _TURN_FIELDS, where)
    text = _text(value, "question", where)
    answers = value.get("answer", [])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: 'answer' must be a text or a list of texts, not {value['answer']!r:.60}.")
    boxes = value.get("boxes", [])
    if not isinstance(boxes, list):
        raise DataError(f"{where}: 'boxes' must be a list, not {boxes!r:.60}.")
    return Turn(text, tuple(answers), tuple(_box(box, where) for box in boxes))


def _box(box: Any, where: str) -> Box4:
    whole = isinstance(box, list) and len(box) == 4 and all(type(side) is int for side in box)
    if not whole or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise DataError(f"{where}: the box {box!r:.60} is not [x0, y0, x1, y1] in whole pixels.")
    return box[0], box[1], box[2], box[3]


def _known(value: Any, fields: tuple[str, ...], where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with {', '.join(fields)}, not {type(value).__name__}.")
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}."
            raise DataError(f"{where}: unknown field {key!r}; {hint}")


def _text(value: dict[str, Any], key: str, where: str) -> str:
    if key not in value:
        raise DataError(f"{where}: {key!r} is missing.")
    text = value[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {key!r} must be a text that is not empty, not {text!r:.60}.")
    return text


def _render(kind: str) -> Callable[[int], Any]:
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.scenes import render_scene

    return render_document if kind == "documents" else render_scene


def drawn_numbers(kind: str, rest: str) -> range:
    """The seeds that a name of drawn pictures means.

    Args:
        kind: "documents" or "scenes".
        rest: "FIRST:COUNT".

    Raises:
        ConfigError: it means nothing, or reaches into the seeds kept for evaluation.
    """
    from qzoom.data.synthetic.records import HELD_OUT_SEEDS

    parts = rest.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts) or int(parts[1]) < 1:
        raise ConfigError(f"{kind}:{rest} does not name drawn pictures; write {kind}:FIRST:COUNT, e.g. {kind}:0:400.")
    first, count = int(parts[0]), int(parts[1])
    if first + count > HELD_OUT_SEEDS.start:
        raise ConfigError(
            f"{kind}:{rest} reaches into the numbers kept for evaluation; stay below {HELD_OUT_SEEDS.start}."
        )
    return range(first, first + count)


def _drawn(kind: str, rest: str, per_picture: int, seed: int) -> list[Question]:
    mode: Literal["text", "natural"] = "text" if kind == "documents" else "natural"
    render = _render(kind)
    out = []
    for number in drawn_numbers(kind, rest):
        asked = render(number).questions
        chosen = random.Random(f"{seed}/{kind}/{number}").sample(asked, min(per_picture, len(asked)))
        turns = tuple(Turn(q.question, (q.answer,), q.boxes) for q in chosen)
        out.append(Question(f"{kind}:{number}", f"{kind}:{number}", turns, mode, kind))
    return out


def _receipts(rest: str) -> list[Question]:

    folder, _, split = rest.rpartition(":")
    if not folder:
        raise ConfigError(f"receipts:{rest} does not name receipts; write receipts:FOLDER:SPLIT.")
    root = Path(folder).resolve()
    out = []
    for sample in read_receipts(root, split).samples:
        turns = tuple(Turn(q.question, (q.answer,), tuple(q.boxes)) for q in sample.questions)
        image = str(Path(str(sample.image)).resolve().relative_to(root))
        out.append(Question(sample.id, image, turns, "text", f"receipts-{split}", str(root)))
    return out


RECEIPT_FIELDS = ("total", "date", "company")
_RECORD: dict[str, type] = {"id": str, "image": str, "width": int, "height": int, "questions": list}
_QUESTION: dict[str, type] = {"field": str, "question": str, "answer": str, "boxes": list}
_OPTIONAL: dict[str, type] = {"negative": bool}
_KINDS = {str: "a text", int: "a whole number", list: "a list", bool: "true or false"}


@dataclass(frozen=True, slots=True, eq=False)
class ReceiptsTask:
    """A checked question file; see `qzoom.data.samples.Task`."""

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


def read_receipt_questions(folder: Path, split: str) -> ReceiptsTask:
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
        sample = _sample(_parse_receipts(line, where), folder, where, fields)
        if sample.id in seen:
            raise DataError(f"{where}: the id {sample.id!r} is already on line {seen[sample.id]}; ids must differ.")
        seen[sample.id] = number
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: no questions in it; expected one JSON object a line.")
    return tuple(samples), hashlib.sha256(data).hexdigest()


def _parse_receipts(line: bytes, where: str) -> Any:
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
        _question_receipts(item, size_px, f"{where}, question {i}", fields)
        for i, item in enumerate(record["questions"], start=1)
    )
    picture = _picture(folder, record["image"], where)
    _check_size(picture, size_px, where)
    return EvalSample(record["id"], picture, size_px, questions)


def _question_receipts(
    value: Any, size_px: tuple[int, int], where: str, fields: tuple[str, ...] | None
) -> EvalQuestion:
    item = _checked(value, _QUESTION, where, None if fields else _OPTIONAL)
    if fields and item["field"] not in fields:
        raise DataError(f"{where}: unknown field {item['field']!r}; known: {', '.join(fields)}.")
    boxes = tuple(_box_receipts(box, size_px, where) for box in item["boxes"])
    return EvalQuestion(
        item["field"], item["question"], item["answer"], boxes, negative=bool(item.get("negative", False))
    )


def _box_receipts(value: Any, size_px: tuple[int, int], where: str) -> Box:
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


@dataclass(frozen=True, slots=True, eq=False)
class UserQuestions:
    """A checked question file; a `qzoom.data.samples.Task`.

    Args:
        samples: its pictures in order of appearance, each with all its questions.
        answers: the right answers of every (picture, number of its question), any of which counts.
        sha256: of the file's bytes.
        labelled: whether every question has an answer; otherwise none has.
    """

    samples: tuple[EvalSample, ...]
    answers: dict[tuple[str, int], tuple[str, ...]]
    sha256: str
    labelled: bool

    @property
    def name(self) -> str:
        """The task's name."""
        return "questions"

    @property
    def fields(self) -> tuple[str, ...]:
        """One for all."""
        return ("answer",)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pictures' paths."""
        return tuple(sample.id for sample in self.samples)

    @property
    def identity(self) -> dict[str, Any]:
        """Digest of the file."""
        return {"task": self.name, "sha256": self.sha256}

    def sample(self, index: int) -> EvalSample:
        """One picture and its questions."""
        return self.samples[index]


def read_calibration_questions(path: Path) -> UserQuestions:
    """Read and check a question file.

    Raises:
        DataError: the file, a line or a picture cannot be used, or only some questions have answers; it says which.
    """
    found: dict[str, list[EvalQuestion]] = {}
    answers: dict[tuple[str, int], tuple[str, ...]] = {}
    labels: dict[bool, str] = {}
    for record in read_questions(path).questions:
        for turn in record.turns:
            asked = found.setdefault(record.image, [])
            answers[record.image, len(asked)] = turn.answers
            labels.setdefault(bool(turn.answers), record.name)
            asked.append(EvalQuestion("answer", turn.question, next(iter(turn.answers), ""), turn.boxes))
    if len(labels) == 2:
        raise DataError(
            f"{path}: the question {labels[True]!r} has an answer and {labels[False]!r} has none; label all questions "
            "or none."
        )
    samples = tuple(
        EvalSample(image, path.parent / image, _size(path.parent / image), tuple(asked))
        for image, asked in found.items()
    )
    return UserQuestions(samples, answers, hashlib.sha256(path.read_bytes()).hexdigest(), True in labels)


def _size(path: Path) -> tuple[int, int]:
    """(width, height) after rotation; a file that is no picture fails later, as questions left out."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:
        return (1, 1)
