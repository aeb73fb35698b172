"""Batch jobs: a file of questions in, a file of answers out, one line each (`qzoom batch`).

A line of the input is one of OpenAI's batch lines or a question as in `qzoom.data.questions`:

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 32}}
    {"id": "b", "image": "scans/3.jpg", "question": "What is the date?"}

A line of the output is OpenAI's: `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`.
Requests go to the server's own application, in this process or at an address, so limits, errors and answers are those
of `qzoom serve`. The first question about a picture is answered before the others about it start: they find its prefix
in the cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.checkpoints.hub import EMBEDDED
from qzoom.data.questions import LINE_FIELDS, PICTURE_FIELDS, QUESTION_FIELDS, TURN_FIELDS
from qzoom.errors import ConfigError, DataError, StopRunError
from qzoom.images.load import local_path
from qzoom.settings import closest
from qzoom.store.log import atomic_path, differences, open_locked, write_atomic, write_line

URLS = ("/v1/chat/completions", "/v1/perceive")
PASSING = (408, 500, 502, 503, 504)
"""Statuses of failures that may pass: such a line is asked again by the next run."""
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One question of the input."""

    id: str  # unique in the file; empty for a line that cannot be read
    number: int  # of the line, from 1
    offset: int  # of the line in the file, in bytes
    part: int = 0  # which question of a line that holds a picture with several; else 0
    group: bytes = b""  # questions about the same pictures have the same

    @property
    def key(self) -> str:
        """What the line is known by in the output; an id is never taken for a line without one."""
        return _key(self.id, self.number)


def _key(name: str | None, number: int) -> str:
    return f"id {name}" if name else f"line {number}"


def index_input(path: Path) -> list[BatchLine]:
    """All questions of the input in order; bodies are read again when they are asked (DataError: the file cannot be
    read, holds no line, or uses an id twice; it names both lines)."""
    lines: list[BatchLine] = []
    seen: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            offset = 0
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    lines += _parts_of(raw, number, offset)
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSONL file of requests.") from error
    for line in lines:
        if line.id and line.id in seen:
            raise DataError(
                f"{path}, line {line.number}: the id {line.id!r} is already on line {seen[line.id]}; ids must differ, "
                "or answers could not be told apart."
            )
        seen[line.id] = line.number
    if not lines:
        raise DataError(f"{path} holds no questions; expected one JSON object a line.")
    if not any(line.id for line in lines):
        _explain_unreadable(path)
    return lines


def _explain_unreadable(path: Path) -> None:
    """Say what is wrong with the first line of a file in which every line is wrong: it is another kind of file."""
    with path.open("rb") as file:
        raw = next(raw for raw in file if raw.strip())
    try:
        _name_of(_parse(raw))
    except DataError as error:
        raise DataError(f"{path} is no file of questions; its first line: {error}") from error


def _parts_of(raw: bytes, number: int, offset: int) -> list[BatchLine]:
    """The questions of one line; one without id if the line cannot be read."""
    unreadable = [BatchLine("", number, offset)]
    try:
        value = _parse(raw)
        name = _name_of(value)
    except DataError:
        return unreadable
    if "custom_id" in value:
        body = value.get("body")
        urls = _urls(body.get("messages")) if isinstance(body, dict) else []
        return [BatchLine(name, number, offset, group=_digest(urls or [name]))]
    group = _digest([str(value.get("image"))])
    questions = value.get("questions")
    if isinstance(questions, list):
        return [BatchLine(f"{name}/{i}", number, offset, i, group) for i in range(1, len(questions) + 1)] or unreadable
    return [BatchLine(name, number, offset, group=group)]


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); mend the line.") from error
    if not isinstance(value, dict):
        raise DataError("not a JSON object; write {'custom_id': ..., 'body': ...} or {'id', 'image', 'question'}.")
    return value


def _name_of(value: Mapping[str, Any]) -> str:
    name = value.get("custom_id", value.get("id"))
    if not isinstance(name, str) or not name:
        raise DataError("no 'custom_id' (OpenAI's batch lines) or 'id' (questions), or it is not a text; add one.")
    return name


def _check_fields(value: Any, known: Sequence[str], where: str = "") -> None:
    """An object has none but these fields; what is no object is refused elsewhere."""
    for key in value if isinstance(value, dict) else ():
        if key not in known:
            raise DataError(f"{where}unknown field {key!r:.80}; {closest(key, known)}")


def _urls(messages: Any) -> list[str]:
    """The addresses of all pictures of a conversation of any shape."""
    parts = [
        part
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict)
    ]
    pictures = [part.get("image_url") or part.get("file") for part in parts]
    urls = [url.get("url") or url.get("file_data") if isinstance(url, dict) else url for url in pictures]
    return [str(url) for url in urls if url is not None]


def _digest(words: Sequence[str]) -> bytes:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).digest()[:16]


def grouped(lines: Sequence[BatchLine]) -> list[list[BatchLine]]:
    """Lines about the same pictures together, in order of first appearance."""
    groups: dict[bytes, list[BatchLine]] = {}
    for line in lines:
        groups.setdefault(line.group or line.key.encode(), []).append(line)
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Turns lines into requests."""

    path: Path  # of the input
    defaults: Mapping[str, Any]  # fields of a body that a line does not give: model, max_tokens, qzoom
    folder: Path  # of the user's input, where paths of questions start
    media: Path  # folder that `file://` addresses and paths may name besides

    def requests(self, line: BatchLine) -> Iterator[tuple[str, dict[str, Any]]]:
        """Route and body of each turn of a line; later ones expect earlier answers in `messages` (DataError,
        ImageError: the line cannot be asked; StopRunError: the input is not what it was; one sentence)."""
        value = self._read(line)
        if "custom_id" in value:
            yield self._openai(value)
            return
        _check_fields(value, PICTURE_FIELDS if "questions" in value else LINE_FIELDS)
        if line.part:
            own = value["questions"][line.part - 1]
            _check_fields(own, QUESTION_FIELDS, f"question {line.part}: ")
            value |= own if isinstance(own, dict) else {"question": None}
        if "question" in value and "turns" in value:
            raise DataError("both 'question' and 'turns'; give one of them.")
        turns = value.get("turns")
        if not isinstance(turns, list) or not turns:
            turns = [{key: value[key] for key in TURN_FIELDS if key in value}]
        for number, turn in enumerate(turns, start=1):
            _check_fields(turn, TURN_FIELDS, f"turn {number}: ")
        picture = self._file(value.get("image"), self.folder)
        for turn in turns:
            question = turn.get("question") if isinstance(turn, dict) else None
            if not isinstance(question, str):
                raise DataError("no 'question', or it is not a text; write {'id', 'image', 'question'}.")
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if turn is turns[0]:
                content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
            yield URLS[0], {**self.defaults, "messages": [{"role": "user", "content": content}]}

    def _read(self, line: BatchLine) -> dict[str, Any]:
        """What the line holds, which must be what it held when the run began."""
        again = "put it back and run the same command again to go on."
        try:
            with self.path.open("rb") as file:
                file.seek(line.offset)
                raw = file.readline()
        except OSError as error:
            raise StopRunError(f"{self.path} cannot be read any more ({error.strerror}); {again}") from error
        try:
            value = _parse(raw)
            name = _name_of(value)
        except DataError:
            if not line.id:
                raise
            name = ""
        if line.id and line.id != (f"{name}/{line.part}" if line.part else name):
            raise StopRunError(f"{self.path} was changed during the run (line {line.number} is another); {again}")
        return value

    def _openai(self, value: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        _check_fields(value, _FIELDS)
        body, url = value.get("body"), value.get("url", URLS[0])
        if url not in URLS or value.get("method", "POST") != "POST":
            raise DataError(f"it must be a POST to {' or '.join(URLS)}, not {value.get('method', 'POST')} {url!r:.60}.")
        if not isinstance(body, dict):
            raise DataError("'body' must be an object, the request as it would be sent.")
        if body.get("stream"):
            raise DataError("'stream' has no meaning in a batch; leave it out.")
        body = {**{k: v for k, v in self.defaults.items() if url == URLS[0] or k in ("model", "qzoom")}, **body}
        return url, json.loads(json.dumps(body), object_hook=self._with_file)

    def _with_file(self, value: dict[str, Any]) -> dict[str, Any]:
        """An object whose `file://` address, if it has one, is replaced by the file's bytes."""
        for key in ("url", "image_url", "file_data"):
            url = value.get(key)
            if isinstance(url, str) and url[:7].lower() == "file://":
                value = {**value, key: self._file(local_path(url), self.media)}
        return value

    def _file(self, name: Any, root: Path) -> str:
        """A picture of this machine as a data URL."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise DataError("'image' must be the path of a picture.")
        if name[:5].lower() == "data:":
            return name
        path = (root / name).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in (root, self.media)):
            raise DataError(f"the picture {name!r:.200} is outside {root}; name its folder with --media.")
        try:
            return "data:application/octet-stream;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
        except OSError as error:
            raise DataError(f"the picture {name!r:.200} cannot be read in {root} ({error.strerror}).") from error


class AnswerFile:
    """The output: a line per answer as it comes, and beside it (`NAME.batch.json`) what the answers belong to.

    Args:
        about: everything that decides the answers, as JSON values; `model` has the model's name in `model`.

    Raises:
        ConfigError: another job's output, or one that is being written.
        DataError: it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path, self._about = path, path.with_name(f"{path.name}.batch.json")
        self._file = open_locked(path, fresh=fresh)
        try:
            if fresh:
                self._about.unlink(missing_ok=True)
            self._check(json.loads(json.dumps(about)))
            self.answered: set[str] = set()  # keys of lines that need not be asked (again)
            self._offsets: dict[str, int] = {}  # of the last line of every key
            self._count = self._end = 0  # lines and bytes of the file
            self._scan()
        except BaseException:
            self._file.close()
            raise

    def _check(self, about: dict[str, Any]) -> None:
        """The output is empty or of the same job."""
        advice = "name another file, or give --fresh to replace it"
        if not self._file.seek(0, os.SEEK_END):  # new, or its answers were taken away
            write_atomic(self._about, json.dumps(about, indent=1))
            return
        try:
            before = json.loads(self._about.read_text())
            if about["model"]["model"] == EMBEDDED:  # earlier versions listed the files of a folder of that name
                before["model"].pop("files", None)
            about = {key: value for key, value in about.items() if key in before}  # nor did they note the engine
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{self.path} is not empty and no batch output ({self._about.name} is missing or damaged); {advice}."
            ) from None
        if changed := differences(before, about):
            raise ConfigError(f"{self.path} holds answers of another job ({'; '.join(changed)}); {advice}.")

    def _scan(self) -> None:
        """Note what the file holds; a torn last line is cut off."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                try:
                    record = json.loads(raw)
                    key = _key(record["custom_id"], record.get("line", 0))
                    passing = (record["response"] or {}).get("status_code") in PASSING
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise DataError(f"{self.path}, line {number} is damaged; remove it or give --fresh.") from error
                (self.answered.discard if passing else self.answered.add)(key)
                self._note(key, len(raw))
        self._file.truncate(self._end)

    def _note(self, key: str, size: int) -> None:
        self._offsets[key] = self._end
        self._end += size
        self._count += 1

    def write(self, line: BatchLine, record: Mapping[str, Any]) -> None:
        """Add an answer by one write (DataError: the disk refuses)."""
        data = json.dumps(record, allow_nan=False).encode() + b"\n"
        write_line(self.path, self._file, data, self._end)
        self.answered.add(line.key)
        self._note(line.key, len(data))

    def finish(self, lines: Sequence[BatchLine]) -> None:
        """Bring the answers into the order of the input; of a line that was asked again the last one stays."""
        offsets = [self._offsets[line.key] for line in lines]
        if offsets == sorted(offsets) and self._count == len(offsets):
            return
        with atomic_path(self.path) as partial, partial.open("wb") as out, self.path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                out.write(file.readline())

    def records(self) -> Iterator[dict[str, Any]]:
        """All answers in the order of the file."""
        with self.path.open("rb") as file:
            for raw in file:
                yield json.loads(raw)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def make_record(line: BatchLine, response: dict[str, Any] | None, error: str = "") -> dict[str, Any]:
    """A line of the output: the response, or the sentence why the line cannot be sent."""
    name = _digest([line.key]).hex()[:24]
    where = {} if line.id else {"line": line.number}
    fault = {"code": "invalid_line", "message": f"Line {line.number}: {error}"} if error else None
    return {"id": f"batch_req_{name}", "custom_id": line.id or None} | where | {"response": response, "error": fault}
