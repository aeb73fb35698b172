"""The user's question file as something to be asked: its pictures with all their questions, its digest, its answers.

The file is the one that `qzoom.records.questions` reads. Questions about the same picture share its coarse look; the
turns of a conversation are asked one by one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzoom.errors import DataError
from qzoom.evaluation.records import EvalQuestion, EvalSample
from qzoom.records.questions import read_questions as read_records

__all__ = ["UserQuestions", "read_questions"]


@dataclass(frozen=True, slots=True, eq=False)
class UserQuestions:
    """A checked question file; a `qzoom.evaluation.records.Task`.

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


def read_questions(path: Path) -> UserQuestions:
    """Read and check a question file.

    Raises:
        DataError: the file, a line or a picture cannot be used, or only some questions have answers; it says which.
    """
    found: dict[str, list[EvalQuestion]] = {}
    answers: dict[tuple[str, int], tuple[str, ...]] = {}
    labels: dict[bool, str] = {}
    for record in read_records(path).questions:
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
