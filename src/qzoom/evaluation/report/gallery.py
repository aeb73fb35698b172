"""Failures to look at: what a zooming run got wrong, by where it went wrong, with what it read outlined.

Pictures are drawn or read again from the task; those that cannot be found leave their card without a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom.errors import QZoomError
from qzoom.evaluation.metrics import hit
from qzoom.evaluation.records import AnswerRow
from qzoom.evaluation.report.runs import Run, TaskRuns
from qzoom.evaluation.score import row_score

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["KINDS", "Card", "failure_kind", "failures", "pick_run"]

KINDS = {
    "misread": "Looked at the right place and read it wrongly",
    "beside": "Looked beside the place",
    "unknown": "Zoomed; the place is not known",
    "coarse": "Did not zoom",
    "failed": "Could not be asked",
}
_PAGE_PX = (520, 420)
_CROP_PX = (520, 150)
_PLACE = (24, 138, 118)


@dataclass(frozen=True, slots=True)
class Card:
    """One failure.

    Args:
        kind: a key of `KINDS`.
        row: the question and what was answered.
        jpeg: the page with what was read (orange) and the known places (green), the region enlarged below it, as
            base64; empty without the picture.
    """

    kind: str
    row: AnswerRow
    jpeg: str


def failure_kind(row: AnswerRow) -> str:
    """Where a wrong answer went wrong; a key of `KINDS`."""
    if row.error is not None:
        return "failed"
    if not row.zoomed:
        return "coarse"
    if not row.boxes:
        return "unknown"
    return "misread" if hit([region.box for region in row.regions], row.boxes) else "beside"


def pick_run(group: TaskRuns) -> Run | None:
    """The run whose failures are shown: the most accurate of the model's own zooming ones, else of all."""
    own = [run for run in group.runs if run.method in ("qzoom", "always")] or list(group.runs)
    return max(own, key=lambda run: sum(map(row_score, run.rows)), default=None)


def failures(group: TaskRuns, run: Run, each: int, data: Path | None = None) -> list[Card]:
    """Some failures of every kind, from different pictures, spread evenly over the run.

    Args:
        group: the task's runs.
        run: one of them.
        each: most cards of a kind.
        data: folder of the task's pictures, where it has one.
    """
    wrong: dict[str, dict[str, AnswerRow]] = {kind: {} for kind in KINDS}
    for row in run.rows:
        if row_score(row) == 0:
            wrong[failure_kind(row)].setdefault(row.picture, row)
    pictures = _Pictures(group, data)
    cards = []
    for kind, rows in wrong.items():
        found = list(rows.values())
        chosen = [found[i * len(found) // each] for i in range(each)] if len(found) > each else found
        cards += [Card(kind, row, _drawn(pictures.of(row.picture), row)) for row in chosen]
    return cards


class _Pictures:
    """The pictures of a task by id.

    Args:
        group: for what decides the questions.
        data: folder, where the task has one.
    """

    def __init__(self, group: TaskRuns, data: Path | None) -> None:
        self._questions = group.questions
        self._data = data
        self._files = self._read_files()

    def of(self, name: str) -> PIL.Image.Image | None:
        """The picture, or None where it cannot be had."""
        from qzoom.evaluation.tasks.synthetic import SYNTHETIC_TASKS, SyntheticTask
        from qzoom.images.load import load_image

        kind, _, number = name.rpartition("-")
        if self._questions.get("task") in SYNTHETIC_TASKS and kind == self._questions["task"] and number.isdigit():
            source = SyntheticTask(kind, int(number), 1).sample(0).image
        elif name in self._files:
            source = self._files[name]
        else:
            return None
        try:
            return load_image(source).image
        except QZoomError:
            return None

    def _read_files(self) -> dict[str, Path]:
        """Pictures of a question file, if it is the one that was asked."""
        from qzoom.evaluation.tasks.receipts import read_receipts

        if self._data is None or "split" not in self._questions or "sha256" not in self._questions:
            return {}
        try:
            task = read_receipts(self._data, str(self._questions["split"]))
        except QZoomError:
            return {}
        same = task.sha256 == self._questions["sha256"]
        return {s.id: s.image for s in task.samples if isinstance(s.image, Path)} if same else {}


def _drawn(picture: PIL.Image.Image | None, row: AnswerRow) -> str:
    """Page and enlarged region as a base64 JPEG."""
    if picture is None:
        return ""
    from PIL import Image, ImageDraw

    from qzoom.images.geometry import scale_box
    from qzoom.plots.overlay import draw_boxes

    page = _within(picture.convert("RGB"), _PAGE_PX)
    draw = ImageDraw.Draw(page)
    for place in row.boxes:
        x0, y0, x1, y1 = scale_box(place, picture.size, page.size)
        draw.rectangle((x0 - 2, y0 - 2, x1 + 1, y1 + 1), outline=_PLACE, width=2)
    page, _ = draw_boxes(page, [region.box for region in row.regions], picture.size, numbered=len(row.regions) > 1)
    if row.regions:
        crop = _within(picture.convert("RGB").crop(row.regions[0].box), _CROP_PX, grow=True)
        whole = Image.new("RGB", (max(page.width, crop.width), page.height + 8 + crop.height), (255, 255, 255))
        whole.paste(page, ((whole.width - page.width) // 2, 0))
        whole.paste(crop, ((whole.width - crop.width) // 2, page.height + 8))
        page = whole
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=82)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _within(image: PIL.Image.Image, room: Sequence[int], *, grow: bool = False) -> PIL.Image.Image:
    """The picture scaled to fit; small ones stay as they are unless they may grow (by 4 at most)."""
    scale = min(room[0] / image.width, room[1] / image.height, 4 if grow else 1)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
