"""What a step is and what it may look at.

A step takes an item and gives one or several back. `apply` is how the pipeline calls it: refused items never reach a
step, an item that cannot be used becomes a refusal with its reason, and only what concerns the whole run gets out as
an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qzoom.distill.records import Item
from qzoom.errors import CheckpointError, ConfigError, DeviceError, QZoomError
from qzoom.records.schema import Box4

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Known",
    "KnownObject",
    "KnownQuestion",
    "KnownText",
    "LaterError",
    "Step",
    "StopRunError",
    "Views",
    "apply",
]


class StopRunError(QZoomError):
    """The whole run cannot go on: the budget is spent, a key is refused, an endpoint was down from the start."""


class LaterError(QZoomError):
    """This item could not be worked on now (an endpoint failed for too long). Nothing is stored, so that a rerun tries
    it again; the run goes on with the other items."""


@dataclass(frozen=True, slots=True)
class KnownQuestion:
    """A question that comes with the picture, for roles by rule.

    Args:
        text: the question.
        answer: the right answer; "" when unknown.
        boxes: all places that hold it, xyxy in original pixels; empty when unknown or absent.
        field: what it asks for in drawn pictures ("code", "total", ...); "" otherwise.
    """

    text: str
    answer: str
    boxes: tuple[Box4, ...]
    field: str = ""


@dataclass(frozen=True, slots=True)
class KnownObject:
    """An object of a drawn scene: names of its colour and shape, and its box."""

    colour: str
    shape: str
    box: Box4


@dataclass(frozen=True, slots=True)
class KnownText:
    """A printed line of a drawn picture and its box."""

    text: str
    box: Box4


@dataclass(frozen=True, slots=True)
class Known:
    """All that is known about a picture without looking; empty for pictures that come alone."""

    questions: tuple[KnownQuestion, ...] = ()
    objects: tuple[KnownObject, ...] = ()
    texts: tuple[KnownText, ...] = ()


@runtime_checkable
class Step(Protocol):
    """One step of the pipeline.

    A call may raise `StopRunError` (the run ends), `LaterError` (the item waits for a rerun), errors of settings,
    models and devices (the run ends) or any other `QZoomError` (the item is refused and the sentence is its reason).
    """

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    def __call__(self, item: Item) -> Sequence[Item]:
        """The item with this step's part filled in, or several of it; refused ones with their decision."""
        ...


class Views(Protocol):
    """What a step may look at. Pictures are shared: draw on copies."""

    def whole(self, item: Item) -> Image:
        """The whole picture, RGB, orientation applied.

        Raises:
            ImageError: it is missing or cannot be decoded.
        """
        ...

    def crop(self, item: Item) -> Image:
        """What teachers see: `crop_box` cut from the whole and enlarged by `scale`.

        Raises:
            ImageError: as `whole`.
            DataError: the item has no region.
        """
        ...

    def known(self, item: Item) -> Known:
        """What is known about the picture."""
        ...


def apply(step: Step, item: Item) -> tuple[Item, ...]:
    """Run a step on an item.

    Args:
        step: the step.
        item: refused ones come back untouched.

    Returns:
        The step's items. Of equal ids the later ones are refused, so that no two kept items have the same.

    Raises:
        StopRunError: the run cannot go on.
        LaterError: the item has to wait.
        ConfigError: the settings are wrong, which concerns all items.
        CheckpointError: a model cannot be loaded, likewise.
        DeviceError: likewise.
    """
    if not item.kept:
        return (item,)
    try:
        made = tuple(step(item))
    except (StopRunError, LaterError, ConfigError, CheckpointError, DeviceError):
        raise
    except QZoomError as error:
        return (item.decide(step.name, False, str(error)),)
    seen: set[str] = set()
    out = []
    for one in made:
        if one.kept and one.id in seen:
            one = one.decide(step.name, False, "the same as another item of this picture")
        if one.kept:
            seen.add(one.id)
        out.append(one)
    return tuple(out)
