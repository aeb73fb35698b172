"""Packs: pictures drawn (or decoded) once, kept in one file and read through a memory map.

Drawing a page costs more than training on a crop of it, so pages are drawn once and every step cuts fresh crops from
them. A pack is two files: `<name>.pixels` holds raw uint8 pictures and int16 character boxes one after the other,
`<name>.jsonl` holds a header line (kind, renderer version, seed, count) and one line a page that says where its bytes
are. A page counts once its index line is complete, and the index line is written after its bytes are on disk, so a
killed process resumes with the next page. One process writes a pack at a time: it holds a lock on the index. A pack
of another renderer version or seed, one whose pixels are cut short, and one whose pages do not follow each other are
refused in one sentence; a pack that lost its pixels is drawn again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from qzoom.errors import DataError
from qzoom.store.log import open_locked

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLine:
    """A printed line: text, box (xyxy, pixels) and, where the renderer knows them, character boxes (len(text), 4)."""

    text: str
    box: Box
    char_boxes_px: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PackedQuestion:
    """A question: `boxes` are all places that hold the answer, `spans` the characters that spell it, as (line, start,
    stop); `easy` when the coarse look should be enough."""

    field: str
    question: str
    answer: str
    boxes: tuple[Box, ...]
    easy: bool = False
    spans: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PackedObject:
    """An object of a scene: names of its colour and shape, and its box (xyxy, pixels)."""

    colour: str
    shape: str
    box: Box


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A picture, grey (h, w) or colour (h, w, 3), uint8, with everything known about it. `capitals`: its texts were
    transcribed in capitals, whatever the print."""

    pixels: np.ndarray
    kind: str
    name: str
    lines: tuple[PackedLine, ...] = ()
    questions: tuple[PackedQuestion, ...] = ()
    objects: tuple[PackedObject, ...] | None = None
    capitals: bool = False


@dataclass(frozen=True, slots=True)
class PackHeader:
    """What a pack holds; two packs are the same when their headers are equal."""

    kind: str
    renderer: str
    seed: int
    count: int


class Pack:
    """A finished pack, read through a memory map.

    Args:
        path: without suffix.
        header: what the caller expects; None takes any.

    Raises:
        DataError: missing, unfinished, truncated, damaged, or of another renderer version or seed.
    """

    def __init__(self, path: Path, header: PackHeader | None = None) -> None:
        found, entries = _read_index(path)
        if found is None:
            raise DataError(f"There is no pack at {path}; make it with `python tiny/train.py pack`.")
        if header is not None:
            _same(path, found, header)
        if len(entries) < found.count:
            raise DataError(
                f"The pack {path} holds {len(entries)} of {found.count} pages; run the same `pack` command again to "
                "finish it."
            )
        pixels_path = path.with_suffix(".pixels")
        if not pixels_path.is_file():
            raise DataError(f"The pack {path} lacks {pixels_path.name}; run the same `pack` command again to draw it.")
        size = pixels_path.stat().st_size
        if entries and entries[-1]["end"] > size:
            raise DataError(
                f"The pack {path} is truncated: {path.name}.pixels has {size} of {entries[-1]['end']} bytes; delete "
                "both files and pack again."
            )
        self.header = found
        self._entries = entries
        self._bytes = np.memmap(pixels_path, dtype=np.uint8, mode="r")
        self._page = lru_cache(maxsize=512)(self._load)

    @property
    def names(self) -> list[str]:
        """The pages' names, in order."""
        return [entry["name"] for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> Page:
        return self._page(number)

    def __iter__(self) -> Any:
        return (self._load(number) for number in range(len(self)))

    def _load(self, number: int) -> Page:
        entry = self._entries[number]
        shape = tuple(entry["shape"])
        start = entry["start"]
        pixels = self._bytes[start : start + int(np.prod(shape))].reshape(shape)
        lines = []
        at = start + pixels.size
        for text, box, drawn in entry["lines"]:
            chars = None
            if drawn:
                chars = self._bytes[at : at + 8 * len(text)].view(np.int16).reshape(-1, 4).astype(np.float32) / 4
                at += 8 * len(text)
            lines.append(PackedLine(text, tuple(box), chars))
        objects = entry.get("objects")
        return Page(
            pixels=pixels,
            kind=entry["kind"],
            name=entry["name"],
            lines=tuple(lines),
            questions=tuple(_question(values) for values in entry["questions"]),
            objects=None if objects is None else tuple(PackedObject(c, s, tuple(b)) for c, s, b in objects),
            capitals=entry["capitals"],
        )


def build_pack(
    path: Path, header: PackHeader, page: Callable[[int], Page], report: Callable[[int], None] | None = None
) -> None:
    """Write (or finish) a pack of `header.count` pages; `page(number)` gives each.

    Raises:
        ConfigError: another process is writing it.
        DataError: an earlier pack there has another header or is damaged, or the disk is full.
    """
    with open_locked(path.with_suffix(".jsonl")):
        _finish(path, header, page, report)


def _finish(path: Path, header: PackHeader, page: Callable[[int], Page], report: Callable[[int], None] | None) -> None:
    """Write the pages that are missing; the caller holds the lock."""
    found, entries = _read_index(path)
    if found is not None:
        _same(path, found, header)
    pixels_path, index_path = path.with_suffix(".pixels"), path.with_suffix(".jsonl")
    if not pixels_path.is_file():  # without its pixels the index says nothing
        found, entries = None, []
    end = entries[-1]["end"] if entries else 0
    if end and pixels_path.stat().st_size < end:
        raise DataError(f"The pack {path} is truncated: delete {pixels_path.name} and {index_path.name}, pack again.")
    if found is not None and len(entries) == header.count:
        return
    try:
        if found is None:
            index_path.write_text(json.dumps({"header": asdict(header)}) + "\n", encoding="utf-8")
        else:
            _drop_partial_line(index_path)
        with pixels_path.open("ab") as pixels, index_path.open("a", encoding="utf-8") as index:
            pixels.truncate(end)
            pixels.seek(end)
            for number in range(len(entries), header.count):
                _append(page(number), pixels, index)
                if report is not None:
                    report(number + 1)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"The disk is full while packing {path}; free some space and run the same command again: it goes on "
                "after the last complete page."
            ) from error
        raise


def _append(page: Page, pixels: IO[bytes], index: IO[str]) -> None:
    """The bytes first, made durable in order, then the index line that makes them count."""
    start = pixels.tell()
    pixels.write(np.ascontiguousarray(page.pixels).tobytes())
    for line in page.lines:
        if line.char_boxes_px is not None:
            pixels.write(np.clip(np.round(line.char_boxes_px * 4), -32768, 32767).astype(np.int16).tobytes())
    pixels.flush()
    os.fdatasync(pixels.fileno())
    entry = {
        "name": page.name,
        "kind": page.kind,
        "start": start,
        "end": pixels.tell(),
        "shape": list(page.pixels.shape),
        "capitals": page.capitals,
        "lines": [[line.text, list(line.box), int(line.char_boxes_px is not None)] for line in page.lines],
        "questions": [[q.field, q.question, q.answer, q.boxes, int(q.easy), q.spans] for q in page.questions],
        "objects": None if page.objects is None else [[o.colour, o.shape, o.box] for o in page.objects],
    }
    index.write(json.dumps(entry) + "\n")
    index.flush()


def _question(values: list[Any]) -> PackedQuestion:
    field, question, answer, boxes, easy, spans = values
    return PackedQuestion(
        field, question, answer, tuple(tuple(b) for b in boxes), bool(easy), tuple(tuple(s) for s in spans)
    )


def _same(path: Path, found: PackHeader, wanted: PackHeader) -> None:
    if found != wanted:
        names = [
            name for name in ("kind", "renderer", "seed", "count") if getattr(found, name) != getattr(wanted, name)
        ]
        first = names[0]
        raise DataError(
            f"The pack {path} has {first} {getattr(found, first)}, not {getattr(wanted, first)}; give another folder "
            "or delete it."
        )


def _read_index(path: Path) -> tuple[PackHeader | None, list[dict[str, Any]]]:
    """The header and all complete entries; a last line that was cut short is left out."""
    index = path.with_suffix(".jsonl")
    if not index.is_file():
        return None, []
    try:
        lines = index.read_text(encoding="utf-8").split("\n")[:-1]
        if not lines:
            return None, []
        header = PackHeader(**json.loads(lines[0])["header"])
        entries = [json.loads(line) for line in lines[1:]]
        _check_entries(path, header.count, entries)
        return header, entries
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"The index {index} cannot be read ({error}); delete the pack and make it again.") from error


def _check_entries(path: Path, count: int, entries: list[dict[str, Any]]) -> None:
    """Refuse more pages than the header counts, and pages that do not lie one after the other."""
    advice = f"delete {path.name}.pixels and {path.name}.jsonl, and pack again"
    if len(entries) > count:
        raise DataError(f"The pack {path} is damaged: it names {len(entries)} pages instead of {count}; {advice}.")
    end = 0
    for entry in entries:
        if entry["start"] != end:
            raise DataError(
                f"The pack {path} is damaged: page {entry['name']} begins at byte {entry['start']} instead of {end}; "
                f"{advice}."
            )
        end = entry["end"]


def _drop_partial_line(index: Path) -> None:
    """Cut what follows the last line end."""
    data = index.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with index.open("r+b") as file:
            file.truncate(whole)
