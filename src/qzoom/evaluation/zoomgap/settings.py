"""How the four views are made; what is declared here is part of a run's settings and stands in its figures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qzoom.errors import ConfigError
from qzoom.evaluation.zoomgap.places import Places
from qzoom.types import ZoomMode

__all__ = ["BOX_STYLES", "VIEWS", "GapSettings", "View"]

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
        places: see `qzoom.evaluation.zoomgap.places`.
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
