"""How the four views are made; what is declared here is part of a run's settings and stands in its figures.

Which of an answer's places the region view shows: one that holds it, or all where it takes them together. Pure.

The region of a question as a picture of its own: cut out with a declared margin, enlarged by a declared factor.

The region and the boxed view as tasks of their own: one picture a question, made from the question's boxes.

They are derived from the answers to the full view, which know every question's places, and asked by the same runner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from qzoom.data.cells import around
from qzoom.data.crop import CropSettings, crop_box, cut
from qzoom.data.samples import AnswerRow, EvalSample, Task
from qzoom.errors import ConfigError, DataError, QZoomError
from qzoom.images.geometry import box_area_px
from qzoom.types import Box, ZoomMode

if TYPE_CHECKING:
    import PIL.Image

__all__ = [
    "BOX_STYLES",
    "TOGETHER",
    "VIEWS",
    "GapSettings",
    "PlaceTask",
    "Places",
    "View",
    "crop",
    "enlargement",
    "key_of",
    "places_shown",
    "region_of",
]


View = Literal["full", "region", "boxed", "zoom"]
VIEWS: tuple[View, ...] = ("full", "region", "boxed", "zoom")
"""The whole picture; the cut-out region; the whole picture with the region marked; the model's own zooming."""
BOX_STYLES = ("rectangle", "ellipse", "dim")
"""Marks that change the picture alone: every view gets the same words."""
_NAMED_SCALES = ("fit", "shipped")
_LARGEST_SCALE = 16.0


@dataclass(frozen=True, slots=True)
class GapSettings:
    """The views of one run.

    Args:
        views: which to ask, in the order of `VIEWS`; "full" is always among them.
        max_visual_tokens: what a question may spend in any view; a zooming one shares it between both looks.
        crop_scale: by how much the crop's sides are enlarged; "fit" enlarges it until it fills the limit; "shipped"
            takes the crop that came with the data instead of one made here.
        crop_margin: added on every side of the region, as a share of its own side.
        crop_min_px: least width and height of the region in original pixels; smaller ones grow about their centre.
        places: see `qzoom.evaluation.zoom_views`.
        box_style: how the boxed view marks the region.
        zoom: how the zoom view looks, "auto" or "always".
        max_new_tokens: most tokens of an answer.

    Raises:
        ConfigError: a value out of range.
    """

    views: tuple[View, ...] = VIEWS
    max_visual_tokens: int = 1024
    crop_scale: float | Literal["fit", "shipped"] = 2.0
    crop_margin: float = 0.1
    crop_min_px: int = 56
    places: Places = "auto"
    box_style: str = "rectangle"
    zoom: ZoomMode = "auto"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        unknown = [view for view in self.views if view not in VIEWS]
        if unknown:
            raise ConfigError(f"views must be among {', '.join(VIEWS)}, not {unknown[0]!r}.")
        if "full" not in self.views or tuple(v for v in VIEWS if v in self.views) != self.views:
            raise ConfigError(f"views must start with 'full' and follow the order {', '.join(VIEWS)}, each once.")
        if isinstance(self.max_visual_tokens, bool) or self.max_visual_tokens < 2:
            raise ConfigError(f"max_visual_tokens must be a whole number from 2, not {self.max_visual_tokens!r}.")
        if self.crop_scale not in _NAMED_SCALES and not _number(self.crop_scale, 0.1, _LARGEST_SCALE):
            raise ConfigError(
                f"crop_scale must be a number from 0.1 to {_LARGEST_SCALE:g}, 'fit' or 'shipped', not "
                f"{self.crop_scale!r}."
            )
        if not _number(self.crop_margin, 0, 10):
            raise ConfigError(f"crop_margin must be a number from 0 to 10, not {self.crop_margin!r}.")
        if isinstance(self.crop_min_px, bool) or not 1 <= self.crop_min_px <= 100_000:
            raise ConfigError(f"crop_min_px must be a whole number from 1 to 100000, not {self.crop_min_px!r}.")
        if self.places not in ("auto", "one", "all"):
            raise ConfigError(f"places must be auto, one or all, not {self.places!r}.")
        if self.box_style not in BOX_STYLES:
            raise ConfigError(f"box_style must be one of {', '.join(BOX_STYLES)}, not {self.box_style!r}.")
        if self.zoom not in ("auto", "always"):
            raise ConfigError(f"zoom must be 'auto' or 'always' in the zoom view, not {self.zoom!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `zoom` is called "zoom_mode", since figures call an accuracy so."""
        found = asdict(self) | {"views": list(self.views)}
        return {"zoom_mode" if name == "zoom" else name: value for name, value in found.items()}


def _number(value: Any, low: float, high: float) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and low <= value <= high


Places = Literal["auto", "one", "all"]
TOGETHER = ("count", "counting", "side", "spatial")
"""Kinds of questions whose answer takes all places together; the places of other kinds each hold it."""


def places_shown(kind: str, boxes: Sequence[Box], rule: Places) -> tuple[Box, ...]:
    """The places that the region has to hold.

    Args:
        kind: the question's field.
        boxes: all places, in original pixels.
        rule: "one" takes the largest, "all" takes all, "auto" decides by `TOGETHER`.
    """
    if not boxes or rule == "all" or (rule == "auto" and kind in TOGETHER):
        return tuple(boxes)
    return (max(boxes, key=box_area_px),)


def region_of(boxes: Sequence[Box], size_px: tuple[int, int], settings: GapSettings) -> Box:
    """The region that holds all places of an answer, cut as the teachers of `qzoom distill` see it.

    Args:
        boxes: at least one, in original pixels.
        size_px: (width, height) of the picture.
        settings: margin and least size.

    Raises:
        DataError: no box, or a region that is empty or outside the picture.
    """
    if not boxes:
        raise DataError("The question has no box, so there is no region to cut out.")
    least = settings.crop_min_px
    rule = CropSettings(settings.crop_margin, min_width_px=least, min_height_px=least)
    region = crop_box(around(boxes), size_px, rule)
    if box_area_px(region) == 0:
        raise DataError(f"The box {around(boxes)!r} has no pixels on the picture of {size_px[0]} x {size_px[1]} px.")
    return region


def enlargement(size_px: tuple[int, int], settings: GapSettings, cell_px: int) -> float:
    """By how much a crop's sides grow.

    With "fit" until its cells number the limit; a crop that is larger already stays as it is, since the model's own
    resizing brings it down.

    Args:
        size_px: (width, height) of the crop.
        settings: scale and limit.
        cell_px: side of the square of pixels that one visual token covers.
    """
    if isinstance(settings.crop_scale, str):
        pixels = settings.max_visual_tokens * cell_px**2
        return max(1.0, math.sqrt(pixels / (size_px[0] * size_px[1])))
    return float(settings.crop_scale)


def crop(image: PIL.Image.Image, region: Box, settings: GapSettings, cell_px: int) -> PIL.Image.Image:
    """Cut a region out and enlarge it.

    Args:
        image: RGB.
        region: inside the picture.
        settings: scale and limit.
        cell_px: see `enlargement`.
    """
    return cut(image, region, enlargement((region[2] - region[0], region[3] - region[1]), settings, cell_px))


_BETWEEN = "#"


@dataclass(frozen=True, slots=True, eq=False)
class PlaceTask:
    """One picture per question of another task; see `qzoom.data.samples.Task`.

    Args:
        base: whose questions.
        view: "region" or "boxed".
        targets: (picture's id, its number in `base`, question's number) of every question to ask.
        settings: how the picture is made.
        cell_px: see `qzoom.evaluation.zoom_views.enlargement`.
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
        from qzoom.data.cells import around
        from qzoom.images.load import load_image

        if self.view == "region" and self.settings.crop_scale == "shipped":
            return load_image(_shipped(self.base, number)).image
        image: Any = whole.image
        region = region_of(boxes, image.size, self.settings)
        if self.view == "region":
            return crop(image, region, self.settings, self.cell_px)
        from qzoom.data.overlay import draw

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
    from qzoom.data.benchmarks.table import picture_source

    rows, column = getattr(base, "rows", None), "crop_image"
    if rows is None or not isinstance(rows[number], dict) or column not in rows[number]:
        raise DataError("No crop came with this question; give crop_scale as a number or 'fit'.")
    return picture_source(rows[number][column], column, getattr(base, "folder", None))
