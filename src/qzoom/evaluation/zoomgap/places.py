"""Which of an answer's places the region view shows: one that holds it, or all where it takes them together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qzoom.images.geometry import box_area_px
from qzoom.types import Box

__all__ = ["TOGETHER", "Places", "places_shown"]

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
