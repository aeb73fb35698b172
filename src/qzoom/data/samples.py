"""Samples (an image and its questions with known answers) and answer rows (one per question that was asked).

Question files, benchmarks and synthetic images all give samples. A row has everything that the figures need, so that
stored answers can be scored again without a model. Boxes are (x0, y0, x1, y1) in original pixels, x1 and y1 exclusive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.errors import DataError
from qzoom.store.log import Log
from qzoom.types import Box, GateDecision, Region, Usage

if TYPE_CHECKING:
    import PIL.Image

ANSWERS = "answers"
"""Purpose of a log of answers: one line per picture with its rows; of several lines about a picture the last counts."""


@dataclass(frozen=True, slots=True)
class SampleQuestion:
    """A question with its right answer."""

    field: str  # what is asked for; figures are given per field
    question: str
    answer: str
    # every place that holds the answer; empty when the place is unknown or the whole picture
    boxes: tuple[Box, ...] = ()
    easy: bool | None = None  # whether the coarse pass should be enough; None if unknown
    answers: tuple[str, ...] = ()  # all accepted answers, or one per person asked; empty for `answer` alone
    choices: tuple[str, ...] = ()  # texts of the options of a multiple-choice question, A first
    metric: str = "exact_match"  # name in `qzoom.scoring.metrics.METRICS`
    negative: bool = False  # what is asked about is not in the picture


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A picture and its questions; `size_px` is (width, height).

    With `error`, a reason, the picture cannot be asked about and its questions count as wrong.
    """

    id: str
    image: Path | PIL.Image.Image | None
    size_px: tuple[int, int]
    questions: tuple[SampleQuestion, ...]
    error: str | None = None
    passing: bool = False  # the error may pass, see `qzoom.errors.may_pass`


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A fixed list of pictures with questions; samples are made or read only when they are wanted."""

    name: str  # on the command line
    ids: tuple[str, ...]  # the pictures' ids, in order, each once
    identity: dict[str, Any]  # what decides the questions (file digest, seeds), as JSON values
    sample: Callable[[int], Sample]  # the sample of `ids[number]`
    fields: tuple[str, ...] = ()  # fields that always appear among the figures
    max_new_tokens: int = 128  # most tokens of an answer
    # the crop that came with the sample of a number, where the data has crops
    shipped_crop: Callable[[int], bytes | Path] | None = None

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, range(len(self.ids)))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow(SampleQuestion):
    """One question as it was answered."""

    picture: str
    index: int
    count: int
    size_px: tuple[int, int]  # (width, height) of the picture
    seconds: float  # wall-clock time of the answer, with the question's share of the picture's coarse pass
    prediction: str = ""  # what the model said; empty after an error
    finish_reason: str = "error"  # see `qzoom.types.Answer`; "error" after an error
    gate: GateDecision | None = None
    regions: tuple[Region, ...] = ()
    usage: Usage = dataclasses.field(default_factory=Usage)
    timing_ms: dict[str, float] = dataclasses.field(default_factory=dict)  # milliseconds per step
    error: str | None = None  # why there is no answer; None when there is one
    passing: bool = False  # the error may pass, so that a rerun asks again
    prompt: str = ""  # the rendered conversation with one placeholder per picture; empty where nothing was asked
    # (width, height) of the picture as the coarse view saw it; what regions saw is in `regions`
    coarse_size_px: tuple[int, int] | None = None
    # what a method paid on top, see `qzoom.evaluation.methods.base.Answered`
    extra: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of coarse view and regions."""
        return self.usage.coarse_tokens + self.usage.region_tokens

    @property
    def encoded_tokens(self) -> int | None:
        """Visual tokens that the encoder gave for the regions, whether read or not; None where sizes are not known."""
        sizes, coarse = [region.crop_size_px for region in self.regions], self.coarse_size_px
        if coarse is None or not self.usage.coarse_tokens or None in sizes:
            return None
        cell = coarse[0] * coarse[1] / self.usage.coarse_tokens
        return round(sum(size[0] * size[1] for size in sizes if size is not None) / cell)

    @property
    def zoomed(self) -> bool:
        """Whether a region was read."""
        return self.gate is not None and self.gate.zoomed

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "gate": self.gate.to_dict() if self.gate else None,
            "regions": [region.to_dict() for region in self.regions],
            "usage": self.usage.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AnswerRow:
        """The inverse of `to_dict` (DataError: not such a row)."""
        try:
            given = dict(values)
            given["boxes"] = tuple(tuple(box) for box in given["boxes"])
            given["size_px"] = tuple(given["size_px"])
            given["gate"] = GateDecision(**given["gate"]) if given["gate"] else None
            given["regions"] = tuple(
                Region(**r | {"box": tuple(r["box"]), "crop_size_px": tuple(r["crop_size_px"] or ()) or None})
                for r in given["regions"]
            )
            given["usage"] = Usage(**given["usage"])
            for name in ("answers", "choices", "coarse_size_px"):
                if given.get(name) is not None:
                    given[name] = tuple(given[name])
            return cls(**given)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not an answer that this version of qzoom wrote ({error})") from error


def rows_of(log: Log) -> dict[str, list[AnswerRow]]:
    """The rows of each picture in a log of answers, in the order in which they were added (DataError: a line that is no
    answer about its picture)."""
    rows: dict[str, list[AnswerRow]] = {}
    for picture, items in log:
        try:
            rows[picture] = [AnswerRow.from_dict(item) for item in items]
        except DataError as error:
            raise DataError(f"{log.path}, picture {picture!r}: {error}; ask again with --fresh.") from error
        if [(row.picture, row.index, row.count) for row in rows[picture]] != [
            (picture, index, len(items)) for index in range(len(items))
        ]:
            raise DataError(f"{log.path}: the answers about {picture!r} are out of order; ask again with --fresh.")
    return rows


def answer_files(places: Sequence[Path]) -> list[Path]:
    """All answer files named, or lying below the folders named, each once (DataError: nothing there)."""
    files: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            inside = sorted(place.rglob("*.jsonl"))
            if not inside:
                raise DataError(f"{place}: no kept answers (*.jsonl) in it; name a folder that `qzoom eval -o` wrote.")
            files |= dict.fromkeys(inside)
        elif place.is_file():
            files[place] = None
        else:
            raise DataError(f"{place}: no such file or folder; name answer files that `qzoom eval` kept.")
    return list(files)


def read_answers(path: Path) -> tuple[dict[str, Any], list[AnswerRow]]:
    """Header ("settings", "about") and rows of a file that an evaluation kept; it is not changed (DataError: the file
    is missing, damaged, or holds something else)."""
    with Log(path, ANSWERS, repeats=True) as log:
        rows = [row for group in rows_of(log).values() for row in group]
        return {"settings": log.settings, "about": log.about}, rows
