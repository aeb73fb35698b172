"""Questions about pictures: one JSON object a line, checked before anything is computed.

    {"id": "q1", "image": "scans/3.jpg", "question": "What is the date?", "answer": "2024-03-01"}
    {"id": "q2", "image": "scans/3.jpg", "turns": [{"question": "Who signed?"}, {"question": "Where?"}]}

`id`, `image` and either `question` or `turns` are needed. `answer` is a text or a list of texts, `boxes` a list of
[x0, y0, x1, y1] in pixels, `mode` is "text" or "natural", `source` any text. Paths start from the file's folder.
Drawn pictures and receipts come in the same form from names: "documents:FIRST:COUNT", "scenes:FIRST:COUNT",
"receipts:FOLDER:SPLIT".

A line may also hold a picture with all its questions, as the receipts do:

    {"id": "r1", "image": "scans/3.jpg", "width": 800, "height": 1200, "questions": [
        {"field": "total", "question": "What is the total?", "answer": "33.90", "boxes": [[10, 100, 60, 120]]}]}

There the boxes must lie inside the picture, and `negative` may mark a question about something that is not in it.
Every error names the file and the line.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qzoom.data.samples import Sample, SampleQuestion, Task
from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.store.schema import Box4, Question, Turn

if TYPE_CHECKING:
    from qzoom.data.synthetic.page import SyntheticSample
    from qzoom.images.load import LoadedImage

DRAWN = ("documents", "scenes")
"""Kinds of drawn pictures."""
RECEIPT_FIELDS = ("total", "date", "company")
_LINE: dict[str, type] = {"id": str, "image": str}
_LINE_OPTIONS: dict[str, type] = dict.fromkeys(("question", "answer", "boxes", "turns", "mode", "source"), object)
_TURN: dict[str, type] = {"question": str}
_TURN_OPTIONS: dict[str, type] = {"answer": object, "boxes": list}
_PICTURE: dict[str, type] = {"id": str, "image": str, "width": int, "height": int, "questions": list}
_QUESTION: dict[str, type] = {"field": str, "question": str, "answer": str, "boxes": list}
LINE_FIELDS = (*_LINE, *_LINE_OPTIONS)
"""Fields of a line with one question or a conversation."""
TURN_FIELDS = (*_TURN, *_TURN_OPTIONS)
"""Fields of each of its turns."""
PICTURE_FIELDS = tuple(_PICTURE)
"""Fields of a line that holds a picture with all its questions."""
QUESTION_FIELDS = (*_QUESTION, "negative")
"""Fields of each of those questions."""
_TYPES = {str: "a text", int: "a whole number", list: "a list", bool: "true or false"}


Read = tuple[list[Question], list[tuple[int, str]]]
"""Questions in order, and line numbers with reasons of those that were skipped."""


def open_questions(
    names: list[str], *, skip_bad: bool = False, per_picture: int = 4, seed: int = 0, rows: bool = False
) -> Read:
    """The questions of several files or drawn sets together.

    Args:
        names: paths of JSONL files, or names as in this module's text.
        skip_bad: leave out and count lines that cannot be used, instead of stopping at the first.
        rows: widen the boxes of drawn documents and receipts to what is printed on their rows.

    Raises:
        DataError: a file or a line cannot be used, or lines are needed and not known; it says which.
        ConfigError: a name that means nothing.
    """
    questions: list[Question] = []
    skipped: list[tuple[int, str]] = []
    for name in names:
        kind, _, rest = name.partition(":")
        if kind in DRAWN and rest:
            questions += _drawn(kind, rest, per_picture, seed, rows=rows)
        elif kind == "receipts" and rest:
            questions += _receipts(rest, rows=rows)
        elif rows:
            raise ConfigError(
                f"{name}: its printed lines are not known; widen its boxes in the file instead of --rows."
            )
        else:
            good, bad = read_questions(Path(name), skip_bad=skip_bad)
            questions += good
            skipped += bad
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if (question.source, question.name) in seen:
            raise DataError(f"The question {question.name!r} of {question.source!r} comes from two of the given sets.")
        seen.add((question.source, question.name))
    return questions, skipped


def read_questions(path: Path, *, skip_bad: bool = False) -> Read:
    """Read and check a question file; lines may have either form.

    Raises:
        DataError: the file cannot be read or holds nothing to use, or (unless skipped) a malformed line, a missing
            picture, an id used twice, an unknown field, or a value of the wrong type; it names the line.
    """
    questions: list[Question] = []
    skipped: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            value = _parse(line, where)
            picture = isinstance(value, dict) and "questions" in value
            question = _of_sample(_sample(value, path, where), path) if picture else _question(value, path, where)
            _check_id(question.name, number, seen, where)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append((number, str(error)))
            continue
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: no questions that can be used; expected one JSON object a line.")
    return questions, skipped


def task_folder(data: Path, name: str) -> Path:
    """The folder of a task's files: `data/name` where the data of several tasks lie in one folder, else `data`."""
    own = data / name
    return own if own.is_dir() else data


def read_receipts(folder: Path, split: str) -> Task:
    """Scanned receipts: the pictures with their questions in `folder/split.jsonl` (DataError: the file or a picture is
    missing, or a line cannot be used; it says which)."""
    return _read_pictures(folder, split, "receipts", RECEIPT_FIELDS)


def read_receipt_questions(folder: Path, split: str) -> Task:
    """The same for a file about any pictures: every `field` is welcome, and `negative` may mark a question (DataError:
    as in `read_receipts`)."""
    return _read_pictures(folder, split, "questions", ())


def read_calibration_questions(path: Path) -> Task:
    """The questions of a file, grouped by picture; the turns of a conversation are asked one by one (DataError: the
    file, a line or a picture cannot be used, or only some questions have answers; it says which)."""
    grouped: dict[str, list[SampleQuestion]] = {}
    labels: dict[bool, str] = {}
    for record in read_questions(path)[0]:
        for turn in record.turns:
            labels.setdefault(bool(turn.answers), record.name)
            answer = next(iter(turn.answers), "")
            question = SampleQuestion("answer", turn.question, answer, turn.boxes, answers=turn.answers)
            grouped.setdefault(record.image, []).append(question)
    if len(labels) == 2:
        raise DataError(
            f"{path}: the question {labels[True]!r} has an answer and {labels[False]!r} has none; label all questions "
            "or none."
        )
    samples = [
        Sample(image, path.parent / image, _size_px(path.parent / image) or (1, 1), tuple(questions))
        for image, questions in grouped.items()
    ]
    return _task("questions", path, samples, ("answer",))


def _task(name: str, path: Path, samples: Sequence[Sample], fields: tuple[str, ...], **identity: Any) -> Task:
    """The samples of a checked file; its digest decides whether a run may go on with it."""
    identity = {"task": name, **identity, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return Task(name, tuple(sample.id for sample in samples), identity, samples.__getitem__, fields)


def load_picture(question: Question, images: Path | None = None) -> LoadedImage:
    """The picture of a question, drawn or read (ImageError: it is missing or cannot be decoded). `images`: folder that
    paths start from instead of the one noted in the record, for data that has moved."""
    from qzoom.images.load import load_image

    kind, _, number = question.image.partition(":")
    if kind in DRAWN and number.isdigit():
        return load_image(render_drawn(kind, int(number)).image)
    root = images if images is not None else Path(question.root)
    path = root / question.image
    if not path.is_file():
        raise ImageError(f"The picture {path} of question {question.name!r} is missing; name its folder or restore it.")
    return load_image(path)


def render_drawn(kind: str, seed: int, **style: Any) -> SyntheticSample:
    """The drawn picture of a kind in `DRAWN`, with its questions."""
    from qzoom.data.synthetic.documents import render_document
    from qzoom.data.synthetic.scenes import render_scene

    return (render_document if kind == "documents" else render_scene)(seed, **style)


def drawn_numbers(kind: str, rest: str) -> range:
    """The seeds that a name of drawn pictures means (ConfigError: it means nothing, or reaches into the seeds kept for
    evaluation). `rest`: "FIRST:COUNT"."""
    from qzoom.data.synthetic.page import HELD_OUT_SEEDS

    parts = rest.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts) or int(parts[1]) < 1:
        raise ConfigError(f"{kind}:{rest} does not name drawn pictures; write {kind}:FIRST:COUNT, e.g. {kind}:0:400.")
    first, count = int(parts[0]), int(parts[1])
    if first + count > HELD_OUT_SEEDS.start:
        raise ConfigError(
            f"{kind}:{rest} reaches into the numbers kept for evaluation; stay below {HELD_OUT_SEEDS.start}."
        )
    return range(first, first + count)


def with_its_row(box: Box4, lines: Iterable[Box4]) -> Box4:
    """A box widened to all that is printed on its row: a value often means nothing without the label beside it."""
    x0, y0, x1, y1 = box
    for left, top, right, bottom in lines:
        if on_one_row(box, (left, top, right, bottom)):
            x0, x1 = min(x0, left), max(x1, right)
    return x0, y0, x1, y1


def on_one_row(first: Box4, second: Box4) -> bool:
    """Whether two boxes share more than half of the lower one's height."""
    shared = min(first[3], second[3]) - max(first[1], second[1])
    return shared > 0.5 * min(first[3] - first[1], second[3] - second[1])


def _drawn(kind: str, rest: str, per_picture: int, seed: int, *, rows: bool = False) -> list[Question]:
    mode: Literal["text", "natural"] = "text" if kind == "documents" else "natural"
    out = []
    for number in drawn_numbers(kind, rest):
        page = render_drawn(kind, number)
        chosen = random.Random(f"{seed}/{kind}/{number}").sample(page.questions, min(per_picture, len(page.questions)))
        lines = _line_boxes(page) if rows and kind == "documents" else []
        turns = tuple(Turn(q.question, (q.answer,), tuple(with_its_row(b, lines) for b in q.boxes)) for q in chosen)
        out.append(Question(f"{kind}:{number}", f"{kind}:{number}", turns, mode, kind))
    return out


def _line_boxes(page: SyntheticSample) -> list[Box4]:
    from qzoom.data.synthetic.page import TextSpan, span_box

    return [span_box(page.lines, TextSpan(n, 0, len(line.text))) for n, line in enumerate(page.lines) if line.text]


def _receipts(rest: str, *, rows: bool = False) -> list[Question]:
    folder, _, split = rest.rpartition(":")
    if not folder:
        raise ConfigError(f"receipts:{rest} does not name receipts; write receipts:FOLDER:SPLIT.")
    path = Path(folder).resolve() / f"{split}.jsonl"
    found = [_of_sample(sample, path, f"receipts-{split}") for sample in read_receipts(path.parent, split)]
    if not rows:
        return found
    lines = _printed_lines(path.parent / "train_lines.jsonl")
    missing = next((question.name for question in found if question.name not in lines), None)
    if missing is not None:
        raise DataError(
            f"train_lines.jsonl in {path.parent} has no lines of the receipt {missing!r}; leave out --rows."
        )
    return [
        dataclasses.replace(
            question,
            turns=tuple(
                dataclasses.replace(turn, boxes=tuple(with_its_row(box, lines[question.name]) for box in turn.boxes))
                for turn in question.turns
            ),
        )
        for question in found
    ]


def _printed_lines(path: Path) -> dict[str, list[Box4]]:
    """The boxes of the printed lines of every receipt."""
    found = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        record = _parse(line, where)
        if not isinstance(record, dict) or not isinstance(record.get("lines"), list):
            raise DataError(f"{where}: expected an object with id and lines.")
        found[str(record.get("id"))] = [_box(dict(item).get("box"), where) for item in record["lines"]]
    return found


def _of_sample(sample: Sample, path: Path, source: str | None = None) -> Question:
    """A picture with its questions as one record."""
    turns = tuple(Turn(q.question, (q.answer,), tuple(q.boxes)) for q in sample.questions)
    # not resolved: the picture may be a link that leads out of the folder, as in a snapshot of the hub
    image = str(Path(str(sample.image)).relative_to(path.parent))
    return Question(sample.id, image, turns, "text", source or path.stem, str(path.parent.resolve()))


def _read_pictures(folder: Path, split: str, name: str, fields: tuple[str, ...]) -> Task:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl"))) if folder.is_dir() else ""
        hint = f"splits there: {there}." if there else "name the folder that holds NAME.jsonl with --data."
        raise DataError(f"{path}: no such question file; {hint}")
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        sample = _sample(_parse(line, where), path, where, fields)
        _check_id(sample.id, number, seen, where)
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: no questions in it; expected one JSON object a line.")
    return _task(name, path, samples, fields, split=split)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of the lines that are not blank."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL file of questions.") from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove the line.") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not a flat JSON record; mend or remove the line.") from error


def _check_id(name: str, number: int, seen: dict[str, int], where: str) -> None:
    if name in seen:
        raise DataError(f"{where}: the id {name!r} is already on line {seen[name]}; ids must differ.")
    seen[name] = number


def _question(value: Any, path: Path, where: str) -> Question:
    """A line of the first form."""
    _check(value, _LINE, where, _LINE_OPTIONS)
    if ("question" in value) == ("turns" in value):
        raise DataError(f"{where}: give either 'question' or 'turns'.")
    if "turns" in value:
        stray = [key for key in ("answer", "boxes") if key in value]
        if stray or not isinstance(value["turns"], list) or not value["turns"]:
            what = f"{stray[0]!r} belongs into each of the turns" if stray else "'turns' must be a list of questions"
            raise DataError(f"{where}: {what}.")
        turns = tuple(_turn(item, f"{where}, turn {i}") for i, item in enumerate(value["turns"], start=1))
    else:
        turns = (_turn({key: value[key] for key in (*_TURN, *_TURN_OPTIONS) if key in value}, where),)
    mode = value.get("mode", "text")
    if mode not in ("text", "natural"):
        raise DataError(f"{where}: 'mode' must be text or natural, not {mode!r:.60}.")
    source = value.get("source", path.stem)
    if not isinstance(source, str):
        raise DataError(f"{where}: 'source' must be a text, not {source!r:.60}.")
    _check_picture(path, value["image"], where)
    return Question(value["id"], value["image"], turns, mode, source, str(path.parent.resolve()))


def _turn(value: Any, where: str) -> Turn:
    _check(value, _TURN, where, _TURN_OPTIONS)
    answers = value.get("answer", [])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{where}: 'answer' must be a text or a list of texts, not {value['answer']!r:.60}.")
    return Turn(value["question"], tuple(answers), tuple(_box(box, where) for box in value.get("boxes", [])))


def _sample(value: Any, path: Path, where: str, fields: tuple[str, ...] = ()) -> Sample:
    """A line of the second form; `fields` are those allowed, none for all."""
    record = _check(value, _PICTURE, where)
    size_px = (record["width"], record["height"])
    if min(size_px) < 1:
        raise DataError(f"{where}: width and height must be positive, not {size_px[0]} x {size_px[1]}.")
    if not record["questions"]:
        raise DataError(f"{where}: no questions; give at least one or remove the line.")
    questions = []
    for number, item in enumerate(record["questions"], start=1):
        place = f"{where}, question {number}"
        _check(item, _QUESTION, place, {} if fields else {"negative": bool})
        if fields and item["field"] not in fields:
            raise DataError(f"{place}: unknown field {item['field']!r}; known: {', '.join(fields)}.")
        boxes = tuple(_box(box, place, size_px) for box in item["boxes"])
        questions.append(
            SampleQuestion(item["field"], item["question"], item["answer"], boxes, negative=item.get("negative", False))
        )
    name = Path(record["image"])
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{where}: the picture {record['image']!r} must be a path inside the data folder.")
    picture = _check_picture(path, record["image"], where)
    # Boxes only fit a picture of the stated size. A file that is no picture fails later, as a wrong answer.
    real = _size_px(picture)
    if real not in (None, size_px):
        raise DataError(
            f"{where}: the picture {picture.name!r} is {real[0]} x {real[1]} px, not the stated {size_px[0]} x "
            f"{size_px[1]}, so boxes would not fit; correct width and height."
        )
    return Sample(record["id"], picture, size_px, tuple(questions))


def _check(value: Any, kinds: dict[str, type], where: str, options: dict[str, type] | None = None) -> dict[str, Any]:
    """The mapping, with all keys of `kinds` and perhaps some of `options`, each of its type."""
    known = kinds | (options or {})
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object with {', '.join(known)}, not {type(value).__name__}.")
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
        if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
            raise DataError(f"{where}: {key!r} must be {_TYPES[kind]}, not {value[key]!r:.60}.")
        if kind is str and not value[key].strip():
            raise DataError(f"{where}: {key!r} is empty; give a text.")
    return value


def _box(value: Any, where: str, size_px: tuple[int, int] | None = None) -> Box4:
    """The box, which must lie inside a picture of `size_px` if that is given."""
    integers = isinstance(value, list) and len(value) == 4 and all(type(side) is int for side in value)
    if not integers or not (0 <= value[0] < value[2] and 0 <= value[1] < value[3]):
        raise DataError(f"{where}: the box {value!r:.60} is not [x0, y0, x1, y1] in whole pixels.")
    if size_px is not None and (value[2] > size_px[0] or value[3] > size_px[1]):
        raise DataError(
            f"{where}: the box {value!r:.60} does not lie inside the picture of {size_px[0]} x {size_px[1]} px."
        )
    return value[0], value[1], value[2], value[3]


def _check_picture(path: Path, name: str, where: str) -> Path:
    if "\0" in name:
        raise DataError(f"{where}: 'image' is no path.")
    picture = path.parent / name
    if not picture.is_file():
        raise DataError(f"{where}: the picture {name!r} is not in {path.parent}; put it there or remove the line.")
    return picture


def _size_px(path: Path) -> tuple[int, int] | None:
    """(width, height) after rotation; None for a file that is no picture."""
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception:
        return None
