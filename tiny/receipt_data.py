"""Real scanned receipts as pages: transcribed lines, label-and-value rows, questions about total, date and company.

The folder holds `train.jsonl`, `train-more.jsonl` and `dev.jsonl` (questions with boxes) and `train_lines.jsonl`
(every printed line with text and box). Transcriptions are in capitals whatever the print, so questions about them say
so. Of the training pictures about one in sixteen, chosen by a hash of its id, is never trained on: its lines are the
held-out lines of every curve.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from qzoom.data.questions import RECEIPT_FIELDS
from qzoom.errors import DataError
from qzoom.store.log import atomic_path
from tiny.pack import Box, PackedLine, PackedQuestion, PackHeader, Page

_HELD_OUT_SHARE = 16
_PAPER_PERCENTILE = 80
_LABEL = re.compile(r"^[A-Z][A-Z .&#/()]{1,22}$")


def is_held_out(name: str) -> bool:
    """Whether the training picture of this id is kept for measuring."""
    return int(hashlib.sha256(f"lines {name}".encode()).hexdigest(), 16) % _HELD_OUT_SHARE == 0


def target_text(field: str, answer: str) -> str:
    """The answer as the model should write it: totals without currency, companies in capitals, spaces single."""
    text = " ".join(answer.split())
    if field == "total":
        text = re.sub(r"^(RM|MYR|\$)\s*", "", text, flags=re.IGNORECASE)
    return text.upper() if field == "company" else text


class ReceiptFolder:
    """The receipts of one split, one page a picture.

    Args:
        folder: holds the JSONL files and the pictures.
        split: "train" (without the held-out pictures), "held_out" (only those) or "dev" (no lines known).
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._folder = folder
        names = ("dev",) if split == "dev" else ("train", "train-more")
        self._lines: dict[str, list[dict[str, Any]]] = {}
        digest = hashlib.sha256()
        if split != "dev":
            self._lines = {entry["id"]: entry["lines"] for entry in self._read("train_lines", digest)}
        entries = [entry for name in names for entry in self._read(name, digest)]
        if split != "dev":
            entries = [entry for entry in entries if is_held_out(entry["id"]) == (split == "held_out")]
        self._entries = entries
        self.header = PackHeader(f"receipts_{split}", f"1-{digest.hexdigest()[:8]}", 0, len(entries))

    def _read(self, name: str, digest: Any) -> list[dict[str, Any]]:
        path = self._folder / f"{name}.jsonl"
        if not path.is_file():
            raise DataError(f"{path} is missing: QZOOM_RECEIPTS, or `receipts` in the recipe, must name their folder.")
        data = path.read_bytes()
        digest.update(data)
        return [json.loads(line) for line in data.decode().splitlines() if line]

    def copy_to(self, folder: Path) -> int:
        """Copy the pictures, and their questions as `questions.jsonl`, into a folder; how many there are."""
        for entry in self._entries:
            picture = folder / entry["image"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / entry["image"], picture)
        with atomic_path(folder / "questions.jsonl") as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in self._entries), encoding="utf-8")
        return len(self._entries)

    def page(self, number: int) -> Page:
        """The page of a picture, grey."""
        entry = self._entries[number]
        with Image.open(self._folder / entry["image"]) as opened:
            pixels = np.asarray(ImageOps.exif_transpose(opened).convert("L"))
        lines = tuple(
            PackedLine(" ".join(line["text"].upper().split()), _inside(line["box"], pixels))
            for line in self._lines.get(entry["id"], [])
            if line["text"].strip() and line["box"][2] - line["box"][0] > 3 and line["box"][3] - line["box"][1] > 3
        )
        fields = [
            PackedQuestion(
                q["field"], q["question"], target_text(q["field"], q["answer"]), tuple(tuple(b) for b in q["boxes"])
            )
            for q in entry["questions"]
        ]
        questions = (*fields, *value_questions(lines))
        return Page(pixels, "receipt", entry["id"], lines, questions, None, capitals=True)


def _inside(box: list[int], pixels: np.ndarray) -> Box:
    height, width = pixels.shape[:2]
    x0, y0 = min(max(0, box[0]), width - 2), min(max(0, box[1]), height - 2)
    return (x0, y0, min(max(box[2], x0 + 2), width), min(max(box[3], y0 + 2), height))


def rows_of(lines: tuple[PackedLine, ...]) -> list[list[int]]:
    """Indexes of the lines, grouped into printed rows from top to bottom, each from left to right."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].box[1] + lines[i].box[3])
    rows: list[list[int]] = []
    for index in order:
        box = lines[index].box
        if rows:
            other = lines[rows[-1][-1]].box
            shared = min(box[3], other[3]) - max(box[1], other[1])
            if shared > 0.5 * min(box[3] - box[1], other[3] - other[1]):
                rows[-1].append(index)
                continue
        rows.append([index])
    return [sorted(row, key=lambda i: lines[i].box[0]) for row in rows]


def only_line(page: Page, field: str) -> int | None:
    """The one line that shows a field's answer, whole."""
    for question in page.questions:
        if question.field == field and len(question.boxes) == 1:
            shown = [i for i, line in enumerate(page.lines) if question.answer in target_text(field, line.text)]
            if len(shown) == 1 and page.lines[shown[0]].box == question.boxes[0]:
                return shown[0]
    return None


def paper_grey(pixels: np.ndarray) -> float:
    """The grey of the paper around print."""
    return float(np.percentile(pixels, _PAPER_PERCENTILE))


def value_questions(lines: tuple[PackedLine, ...]) -> list[PackedQuestion]:
    """Questions for the value beside a label, where the label occurs once on the page."""
    found: dict[str, list[PackedQuestion]] = {}
    for row in rows_of(lines):
        for label, value, parts in _pairs([lines[index] for index in row], row):
            name = label.strip(" .:#").lower()
            if name in RECEIPT_FIELDS:
                continue
            answer = re.sub(r"^(RM|MYR|\$)\s*(?=\d)", "", value)
            asked = (
                f"What does it say for {name} in capitals?" if re.search("[A-Z]", answer) else f"What is the {name}?"
            )
            boxes = np.array([lines[index].box for index in parts])
            box = (*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
            found.setdefault(name, []).append(PackedQuestion("value", asked, answer, (box,)))
    return [questions[0] for questions in found.values() if len(questions) == 1]


def _pairs(segments: list[PackedLine], row: list[int]) -> list[tuple[str, str, list[int]]]:
    """(label, value, lines that show both) of one row."""
    pairs = []
    for place, segment in enumerate(segments):
        label, mark, value = segment.text.partition(":")
        if mark and value.strip() and _LABEL.match(label.strip()):
            pairs.append((label.strip(), value.strip(), [row[place]]))
        elif place + 1 < len(segments):
            following = segments[place + 1].text
            marked = mark or following.startswith(":")
            bare = following.strip(": ")
            last_amount = place == 0 and len(segments) == 2 and re.fullmatch(r"(RM|MYR|\$)?\s*\d+\.\d\d", bare)
            if bare and _LABEL.match(label.strip()) and not value.strip() and (marked or last_amount):
                pairs.append((label.strip(), bare, [row[place], row[place + 1]]))
    return [pair for pair in pairs if len(pair[1]) <= 28 and not re.search(r"[A-Z] ?:|[:.]$", pair[1])]
