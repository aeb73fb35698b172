"""The region and the boxed view as tasks of their own: one picture a question, made from the question's boxes.

They are derived from the answers to the full view, which know every question's places, and asked by the same runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qzoom.errors import DataError, QZoomError
from qzoom.evaluation.records import AnswerRow, EvalSample, Task
from qzoom.evaluation.zoomgap.crops import crop, region_of
from qzoom.evaluation.zoomgap.places import places_shown
from qzoom.evaluation.zoomgap.settings import GapSettings

__all__ = ["PlaceTask", "key_of"]

_BETWEEN = "#"


@dataclass(frozen=True, slots=True, eq=False)
class PlaceTask:
    """One picture per question of another task; see `qzoom.evaluation.records.Task`.

    Args:
        base: whose questions.
        view: "region" or "boxed".
        targets: (picture's id, its number in `base`, question's number) of every question to ask.
        settings: how the picture is made.
        cell_px: see `qzoom.evaluation.zoomgap.crops.enlargement`.
    """

    base: Task
    view: Literal["region", "boxed"]
    targets: tuple[tuple[str, int, int], ...]
    settings: GapSettings
    cell_px: int
    _held: dict[int, EvalSample] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The view's name."""
        return self.view

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of the task that it is made from."""
        return self.base.fields

    @property
    def ids(self) -> tuple[str, ...]:
        """The picture's id and the question's number."""
        return tuple(f"{picture}{_BETWEEN}{index}" for picture, _, index in self.targets)

    @property
    def identity(self) -> dict[str, Any]:
        """The task's, the view, and what decides how its pictures look."""
        own: dict[str, Any] = {"view": self.view, "places": self.settings.places}
        if self.view == "region":
            names = ("crop_scale", "crop_margin", "crop_min_px")
            own |= {name: getattr(self.settings, name) for name in names}
        else:
            own["box_style"] = self.settings.box_style
        return self.base.identity | own

    def sample(self, index: int) -> EvalSample:
        """One question and its picture; with a reason where the picture cannot be made."""
        _, number, asked = self.targets[index]
        name = self.ids[index]
        whole = self._whole(number)
        question = whole.questions[asked]
        if whole.error is not None:
            return EvalSample(name, None, whole.size_px, (question,), whole.error)
        try:
            image = self._made(whole, number, places_shown(question.field, question.boxes, self.settings.places))
        except QZoomError as problem:
            return EvalSample(name, None, whole.size_px, (question,), str(problem))
        if self.view == "region":
            question = replace(question, boxes=())
        return EvalSample(name, image, image.size, (question,))

    def _whole(self, number: int) -> EvalSample:
        """The picture that questions in a row share, kept decoded until another one is wanted."""
        from qzoom.images.load import load_image

        if number not in self._held:
            self._held.clear()
            sample = self.base.sample(number)
            if sample.error is None:
                try:
                    sample = replace(sample, image=load_image(sample.image).image)
                except QZoomError as problem:
                    sample = replace(sample, image=None, error=str(problem))
            self._held[number] = sample
        return self._held[number]

    def _made(self, whole: EvalSample, number: int, boxes: Sequence[Any]) -> Any:
        from qzoom.evaluation.areas import around
        from qzoom.images.load import load_image

        if self.view == "region" and self.settings.crop_scale == "shipped":
            return load_image(_shipped(self.base, number)).image
        image: Any = whole.image
        region = region_of(boxes, image.size, self.settings)
        if self.view == "region":
            return crop(image, region, self.settings, self.cell_px)
        from qzoom.distill.overlay import draw

        style: Any = self.settings.box_style
        return draw(image, around(boxes), style, tokens=self.settings.max_visual_tokens)


def key_of(row: AnswerRow) -> tuple[str, int]:
    """Picture and number of the question that an answer in the region or boxed view belongs to.

    Raises:
        DataError: an answer of another run.
    """
    picture, between, index = row.picture.rpartition(_BETWEEN)
    if not between or not index.isdigit():
        raise DataError(f"The answer about {row.picture!r} belongs to no view of a region; ask again with --fresh.")
    return picture, int(index)


def _shipped(base: Task, number: int) -> Any:
    """The crop that came with the data."""
    from qzoom.evaluation.tasks.pictures import picture_source

    rows, column = getattr(base, "rows", None), "crop_image"
    if rows is None or not isinstance(rows[number], dict) or column not in rows[number]:
        raise DataError("No crop came with this question; give crop_scale as a number or 'fit'.")
    return picture_source(rows[number][column], column, getattr(base, "folder", None))
