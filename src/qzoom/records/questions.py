"""The user's questions: one JSON object a line, checked before anything is computed.

    {"id": "q1", "image": "scans/3.jpg", "question": "What is the date?", "answer": "2024-03-01"}
    {"id": "q2", "image": "scans/3.jpg", "turns": [{"question": "Who signed?"}, {"question": "Where?"}]}

`id`, `image` and either `question` or `turns` are needed. `answer` is a text or a list of texts, `boxes` a list of
[x0, y0, x1, y1] in pixels, `mode` is "text" or "natural", `source` any text. Paths start from the file's folder.
Drawn pictures and receipts come in the same form from names: "documents:FIRST:COUNT", "scenes:FIRST:COUNT",
"receipts:FOLDER:SPLIT".
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qzoom.errors import ConfigError, DataError, ImageError
from qzoom.records.schema import Box4, Question, Turn

if TYPE_CHECKING:
    from qzoom.images.load import LoadedImage

__all__ = ["DRAWN", "QuestionSet", "drawn_numbers", "load_picture", "open_questions", "read_questions"]

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
    from qzoom.synthetic.documents import render_document
    from qzoom.synthetic.scenes import render_scene

    return render_document if kind == "documents" else render_scene


def drawn_numbers(kind: str, rest: str) -> range:
    """The seeds that a name of drawn pictures means.

    Args:
        kind: "documents" or "scenes".
        rest: "FIRST:COUNT".

    Raises:
        ConfigError: it means nothing, or reaches into the seeds kept for evaluation.
    """
    from qzoom.synthetic.records import HELD_OUT_SEEDS

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
    from qzoom.evaluation.tasks.receipts import read_receipts

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
