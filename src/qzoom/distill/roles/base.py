"""What each role does. A step knows only these; whether a rule or a model stands behind one is decided in a recipe.

Every role has a `name` and a `model` (model and weights as far as known), which the items keep. Calls may raise
`StopRunError` and `LaterError` of `qzoom.distill.steps`, or `CallRefusedError` for this one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from qzoom.distill.records import Asked, Item, Region, Vote
from qzoom.errors import DataError, QZoomError

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.steps import Views

__all__ = [
    "Asker",
    "CallRefusedError",
    "Judge",
    "Maker",
    "Reader",
    "Role",
    "Teacher",
    "Validator",
    "with_model",
]


class CallRefusedError(QZoomError):
    """An endpoint refuses this one call for good (too long, not allowed); trying again would not help."""


class Role(Protocol):
    """What all have."""

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    @property
    def model(self) -> str:
        """What answers."""
        ...


class Asker(Role, Protocol):
    """Writes questions about a crop."""

    def ask(self, item: Item, views: Views) -> Sequence[Asked]:
        """Questions, possibly none."""
        ...


class Validator(Role, Protocol):
    """Says whether a question can be used."""

    def check(self, item: Item, views: Views) -> str:
        """Why not; "" when it can."""
        ...


class Teacher(Role, Protocol):
    """Answers from the crop."""

    def answer(self, item: Item, views: Views, sample: int) -> Vote:
        """Sample number `sample` of it."""
        ...


class Judge(Role, Protocol):
    """Compares answers that rules cannot."""

    def same(self, question: str, first: str, second: str) -> bool | None:
        """Whether both mean the same; None when it gives no usable reply."""
        ...


class Maker(Role, Protocol):
    """Writes wrong options."""

    def distractors(self, item: Item, views: Views, count: int) -> Sequence[str]:
        """Up to `count` of them, best first; the step checks them."""
        ...


class Reader(Role, Protocol):
    """The student, or whoever guesses without a picture."""

    def read(self, item: Item, image: Image | None, text: str, sample: int) -> Vote:
        """Sample number `sample` of its answer to a text, with or without a picture; the item is for rules only."""
        ...


def with_model(item: Item, role: str, model: str) -> Item:
    """The item with one more model noted, once."""
    if not model or (role, model) in item.models:
        return item
    return dataclasses.replace(item, models=(*item.models, (role, model)))


def region_of(item: Item) -> Region:
    """The item's region.

    Raises:
        DataError: it has none.
    """
    if item.region is None:
        raise DataError("This item has no region; run the step propose first.")
    return item.region


def asked_of(item: Item) -> Asked:
    """The item's question.

    Raises:
        DataError: it has none.
    """
    if item.asked is None:
        raise DataError("This item has no question; run the step ask first.")
    return item.asked
