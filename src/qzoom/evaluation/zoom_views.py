"""The views of the zooming gap: settings, the region of a question, and the region and boxed views as tasks.

In these two tasks every question has an image of its own, made from the question's boxes. They are asked by the same
runner as the full view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import PIL.Image

from qzoom.data.cells import around
from qzoom.data.crop import CropSettings, crop_box, cut
from qzoom.data.overlay import draw
from qzoom.data.samples import AnswerRow, Sample, Task
from qzoom.errors import ConfigError, DataError, QZoomError, may_pass
from qzoom.images.geometry import box_area_px
from qzoom.images.load import load_image
from qzoom.settings import Between, settings, to_dict
from qzoom.types import Box

View = Literal["full", "region", "boxed", "zoom"]
VIEWS: tuple[View, ...] = ("full", "region", "boxed", "zoom")
"""The whole picture; the cut-out region; the whole picture with the region marked; the model's own zooming."""
Places = Literal["auto", "one", "all"]


@settings(prefix=False)
class GapSettings:
    """Settings of the views; stored with the run and printed with its results."""

    views: tuple[View, ...] = VIEWS
    """Views to ask: full, region, boxed, zoom; must include full."""
    max_visual_tokens: Annotated[int, Between(2)] = 1024
    """Maximum number of visual tokens per question in every view; the zoom view divides them between coarse view and
    regions."""
    crop_scale: Annotated[float, Between(0.1, 16)] | Literal["fit", "shipped"] = 2.0
    """Factor by which the crop is enlarged; "fit" enlarges it until it uses all visual tokens; "shipped" takes the crop
    of the data set."""
    crop_margin: Annotated[float, Between(0, 10)] = 0.1
    """Margin on every side of the region, as a share of its width or height."""
    crop_min_px: Annotated[int, Between(1, 100_000)] = 56
    """Minimum width and height of the region in original pixels; smaller regions are enlarged about their centre."""
    places: Places = "auto"
    """Boxes of an answer that the region shows: one (the largest), all, or auto (all for counts and sides, else
    one)."""
    box_style: Literal["rectangle", "ellipse", "dim"] = "rectangle"
    """How the boxed view marks the region; the prompt is the same in every view."""
    zoom: Literal["auto", "always"] = "auto"
    """Zoom mode of the zoom view."""
    max_new_tokens: Annotated[int, Between(1)] = 128
    """Maximum number of tokens of an answer."""

    def __post_init__(self) -> None:
        if "full" not in self.views or tuple(v for v in VIEWS if v in self.views) != self.views:
            raise ConfigError(f"views must start with 'full' and follow the order {', '.join(VIEWS)}, each once.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `zoom` is called "zoom_mode", since figures call an accuracy so."""
        return {"zoom_mode" if name == "zoom" else name: value for name, value in to_dict(self).items()}


TOGETHER = ("count", "counting", "side", "spatial")
"""Kinds of questions whose answer takes all boxes together; of other kinds each box holds it."""


def target_boxes(kind: str, boxes: Sequence[Box], rule: Places) -> tuple[Box, ...]:
    """The boxes that the region has to hold. `rule`: "one" takes the largest, "all" takes all, "auto" decides by
    `TOGETHER`."""
    if not boxes or rule == "all" or (rule == "auto" and kind in TOGETHER):
        return tuple(boxes)
    return (max(boxes, key=box_area_px),)


def region_of(boxes: Sequence[Box], size_px: tuple[int, int], settings: GapSettings) -> Box:
    """The region that holds all boxes of an answer, cut as the teachers of `qzoom distill` see it (DataError: no box,
    or a region that is empty or outside the picture). `boxes`: at least one, in original pixels."""
    if not boxes:
        raise DataError("The question has no box, so there is no region to cut out.")
    least = settings.crop_min_px
    rule = CropSettings(settings.crop_margin, min_width_px=least, min_height_px=least)
    region = crop_box(around(boxes), size_px, rule)
    if box_area_px(region) == 0:
        raise DataError(f"The box {around(boxes)!r} has no pixels on the picture of {size_px[0]} x {size_px[1]} px.")
    return region


def enlargement(size_px: tuple[int, int], settings: GapSettings, token_px: int) -> float:
    """By how much a crop's sides grow.

    With "fit" until its cells number the limit; a crop that is larger already stays as it is, since the model's own
    resizing brings it down.

    Args:
        size_px: (width, height) of the crop.
        token_px: side of the square of pixels that one visual token covers.
    """
    if isinstance(settings.crop_scale, str):
        pixels = settings.max_visual_tokens * token_px**2
        return max(1.0, math.sqrt(pixels / (size_px[0] * size_px[1])))
    return float(settings.crop_scale)


def crop(image: PIL.Image.Image, region: Box, settings: GapSettings, token_px: int) -> PIL.Image.Image:
    """Cut a region out and enlarge it."""
    return cut(image, region, enlargement((region[2] - region[0], region[3] - region[1]), settings, token_px))


_BETWEEN = "#"


def region_task(
    base: Task,
    view: Literal["region", "boxed"],
    targets: Sequence[tuple[str, int, int]],
    settings: GapSettings,
    token_px: int,
) -> Task:
    """One picture per question of another task; with a reason where the picture cannot be made. `targets`: (picture's
    id, its number in `base`, question's number) of every question to ask."""
    decoded: dict[int, Sample] = {}

    def whole(number: int) -> Sample:
        """The picture of consecutive questions, decoded once."""
        if number not in decoded:
            decoded.clear()
            decoded[number] = _decoded(base.sample(number))
        return decoded[number]

    def sample(index: int) -> Sample:
        picture, number, asked = targets[index]
        name, full = f"{picture}{_BETWEEN}{asked}", whole(number)
        question = full.questions[asked]
        if full.error is not None:
            return Sample(name, None, full.size_px, (question,), full.error, full.passing)
        try:
            image = make(full.image, number, target_boxes(question.field, question.boxes, settings.places))
        except QZoomError as problem:
            return Sample(name, None, full.size_px, (question,), str(problem), may_pass(problem))
        return Sample(name, image, image.size, (replace(question, boxes=()) if view == "region" else question,))

    def make(image: Any, number: int, boxes: Sequence[Box]) -> Any:
        if view == "region" and settings.crop_scale == "shipped":
            if base.shipped_crop is None:
                raise DataError("No crop came with this question; give crop_scale as a number or 'fit'.")
            return load_image(base.shipped_crop(number)).image
        region = region_of(boxes, image.size, settings)
        if view == "region":
            return crop(image, region, settings, token_px)
        return draw(image, around(boxes), settings.box_style, tokens=settings.max_visual_tokens)

    names = ("crop_scale", "crop_margin", "crop_min_px") if view == "region" else ("box_style",)
    own = {"view": view, "places": settings.places} | {name: getattr(settings, name) for name in names}
    ids = tuple(f"{picture}{_BETWEEN}{index}" for picture, _, index in targets)
    return Task(view, ids, base.identity | own, sample, base.fields)


def _decoded(sample: Sample) -> Sample:
    if sample.error is not None:
        return sample
    try:
        return replace(sample, image=load_image(sample.image).image)
    except QZoomError as problem:
        return replace(sample, image=None, error=str(problem), passing=may_pass(problem))


def base_question(row: AnswerRow) -> tuple[str, int]:
    """Picture and number of the question that an answer in the region or boxed view belongs to (DataError: an answer of
    another run)."""
    picture, between, index = row.picture.rpartition(_BETWEEN)
    if not between or not index.isdigit():
        raise DataError(f"The answer about {row.picture!r} belongs to no view of a region; ask again with --fresh.")
    return picture, int(index)
