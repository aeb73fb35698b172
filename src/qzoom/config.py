"""What a checkpoint's zooming arithmetic is: one frozen, validated record, JSON in and out.

A checkpoint carries its own arithmetic. `ZoomConfig()` is that of the authors' release (docs/method.md 2-4 and 9):
absolute threshold, one union box, 28 px minimum, float32 cell-to-pixel scaling. Ours may choose otherwise, field by
field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from qzoom.errors import BudgetError, ConfigError
from qzoom.settings import Between, Share, from_mapping, refuse_unknown, settings


@settings(error=BudgetError, prefix=False)
class TokenBudget:
    """Limits on visual tokens (merged patches), both inclusive.

    Raises:
        BudgetError: the minimum is below 1 or above the maximum.
    """

    min_tokens: int
    """Fewest visual tokens."""
    max_tokens: int
    """Most visual tokens."""

    def __post_init__(self) -> None:
        if self.min_tokens < 1 or self.max_tokens < self.min_tokens:
            raise BudgetError(
                f"Visual-token limits contradict: min_tokens={self.min_tokens}, max_tokens={self.max_tokens}; "
                "choose 1 <= min_tokens <= max_tokens."
            )


@settings
class BoxRule:
    """How a region map becomes boxes (docs/method.md 3). The defaults are the release's."""

    scaling: Literal["float32", "exact"] = "float32"
    """"float32" keeps the release's rounding (a box up to the edge of a 1000 px picture may end at 999); "exact" uses
    integer arithmetic and covers every pixel of every chosen cell."""
    threshold: Literal["absolute", "relative"] = "absolute"
    """"absolute" compares the blurred map itself with the region threshold; "relative" compares it with the threshold
    times the map's maximum."""
    components: Literal["union", "peak_component", "all", "groups"] = "union"
    """"union" draws one box around all foreground cells; "peak_component" keeps the connected component with the
    highest cell; "all" gives one box per connected component, best first; "groups" one per component, picture by
    picture in reading order, after `min_cells`, `max_cells` and `widen_cells`."""
    max_regions: Annotated[int, Between(1, 64)] = 1
    """Most boxes per question ("all"), or per picture ("groups")."""
    shares: Literal["area", "equal"] = "area"
    """How several regions share the token budget: by their areas in pixels, or equally."""
    margin_cells: Annotated[float, Between(0, 64)] = 0.0
    """Cells added on every side of a box before scaling, clipped to the picture."""
    min_side_px: Annotated[int, Between(1, 4096)] = 28
    """Smallest side of a box in original pixels; smaller ones grow about their centre."""
    min_peak: Share = 0.0
    """With threshold "relative", maps whose maximum is not above this are empty."""
    too_many: Literal["none", "mask"] = "none"
    """What is read of a picture with more boxes than `max_regions` ("groups" only): nothing, or one box around all its
    foreground cells, of which only the tokens that lie on the foreground are read."""
    min_cells: Annotated[int, Between(1)] = 1
    """Components of fewer cells give no box ("groups" only)."""
    max_cells: Annotated[int, Between(1)] | None = None
    """Components of more cells give no box ("groups" only)."""
    widen_cells: Annotated[int, Between(0)] = 0
    """Components of at most this many cells get a box that is a cell larger and at least 3 cells long on each side,
    about their centre ("groups" only)."""
    widen_to_edge: bool = True
    """Whether such a box may reach the right and lower border; the release of LLaVA-1.5 stops a cell before it."""
    sparse: Annotated[float, Between(1, 8)] | None = None
    """Read only the tokens of a region on its foreground and next to it, its crop having been enlarged along each side,
    by this at most, so that about as many tokens stay; None reads whole regions."""

    def __post_init__(self) -> None:
        if self.too_many == "mask" and self.margin_cells:
            raise ConfigError("Tokens on the foreground are read without a margin; set margin_cells to 0.")
        if self.too_many == "mask" and self.sparse is not None:
            raise ConfigError('too_many="mask" and sparse both choose tokens of a region; set one of them.')


OUR_BOX_RULE = BoxRule(
    scaling="exact", threshold="relative", components="peak_component", margin_cells=0.5, min_side_px=32
)
"""The rule of the embedded model: the component around the map's peak, every pixel of it, with a margin."""


@settings
class RereadRule:
    """When and where a zoomed answer is read again, in a smaller crop (docs/method.md 4.1)."""

    layer: Annotated[int, Between(0, 1000)]
    """Decoder layer with heads that look where the next token of the answer is read."""
    heads: Annotated[tuple[Annotated[int, Between(0, 1000)], ...], Field(min_length=1)]
    """Those heads; their attention is averaged."""
    below: Share = 0.7
    """Read again where the least certain token of the first answer has a probability below this."""
    longest: Annotated[int, Between(1, 512)] = 32
    """Most tokens of the first answer; a longer one counts as it is."""
    margin_across: Annotated[float, Between(0, 64)] = 1.5
    """Tokens of the first crop added to the answer's place on the left and on the right."""
    margin_down: Annotated[float, Between(0, 64)] = 0.75
    """Tokens of the first crop added above and below."""
    share: Annotated[float, Between(0.05, 0.95)] = 0.34
    """Of the region tokens that the second crop may take; the first one gets the rest."""
    enlarged_to: Share = 0.67
    """Small second crops are enlarged to this share of their tokens."""
    least_tokens: Annotated[int, Between(1, 1_000_000)] = 96
    """Region tokens, both crops together, below which an answer is read once: two crops would be too coarse."""


@settings
class Preset:
    """A named pair of thresholds, e.g. the release's for documents."""

    gate_threshold: Share
    region_threshold: Share


@settings
class ZoomConfig:
    """All that turns a base model's hidden states into a decision and boxes, and how crops are read.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    shared_layers: Annotated[int, Between(1, 1000)] = 3
    """K, the decoder layers that the coarse pass, both branches and the answer share ("twig_K")."""
    branch_layers: Annotated[int, Between(1, 1000)] = 3
    """T, the depth of the gate and of the region branch ("twig_T")."""
    decide_by: Literal["gate", "map", "answer"] = "gate"
    """What decides whether to zoom: "gate" (the gate's probability), "map" (how far the region map's peak stands out,
    1 - mean / peak over all pictures; a peak 3 times the mean is 0.667) or "answer" (how little the likeliest of the 64
    likeliest tokens of the coarse answer stands out, from 0 to 0.5). "map" and "answer" need no gate."""
    answer_tokens: Annotated[int, Between(1, 64)] = 1
    """Tokens of the coarse answer that decide, the least certain of them alone ("answer" only)."""
    gate_threshold: Share = 0.1
    """Zoom when the score of what decides is at least this."""
    region_threshold: Share = 0.1
    """Foreground when the blurred map is above this (see `BoxRule.threshold`)."""
    sink: Literal["first_token", "corner", "none"] = "first_token"
    """How sink cells are taken out of the region map: "first_token" (the first prompt token's head-0 query), "corner"
    (corner cells of maps above 256 cells), or "none". The release's rule depends on the model family
    (`Backbone.default_sink`)."""
    sink_threshold: Share = 0.75
    """Cells whose first-token probability reaches this are dropped ("first_token" only)."""
    positions: Literal["second_image", "aligned"] = "second_image"
    """"second_image" gives the crop stock positions; "aligned" interpolates its positions from the coarse cells that
    its box covers (docs/method.md 4, "reuse_src_pos"). LLaVA counts positions along one axis: there a checkpoint's
    "aligned" means "second_image", and one that is given is refused."""
    temporal_shift: Literal["max", "min"] = "max"
    """With aligned positions, "max" (release) or "min" (paper) of the coarse grid's sides."""
    map_rotary: bool = True
    """Whether the region map's queries and keys are rotated by their positions."""
    map_heads: Literal["mean", "joined"] = "mean"
    """"mean" averages the scaled products of all heads; "joined" takes one product over all of them, not scaled."""
    branch_norm: bool = False
    """Whether the region branch has a norm of its own before its last layer."""
    box: BoxRule = field(default_factory=BoxRule)
    """How the map becomes boxes."""
    reread: RereadRule | None = None
    """How a greedy answer from a region is read again in a smaller crop; None reads once."""
    tokens_per_cell: Annotated[float, Between(0.1, 24)] | None = None
    """Tokens of a region along each side per coarse cell of its box, its features being resized to that; None keeps
    all of them."""
    coarse_tokens: TokenBudget | None = None
    """Limits of the coarse pass, per picture; None leaves the image processor's own limits."""
    region_tokens: TokenBudget | None = None
    """Limits of all regions together; None uses the coarse limits, as the release does."""
    presets: dict[str, Preset] = field(default_factory=dict)
    """Named threshold pairs."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Free text facts about how the heads were made."""

    def __post_init__(self) -> None:
        if self.tokens_per_cell is not None and self.box.sparse is not None:
            raise ConfigError("tokens_per_cell and box.sparse both choose tokens of a region; set one of them.")
        if self.tokens_per_cell is not None and self.reread is not None:
            raise ConfigError(
                "With tokens_per_cell a second crop is no finer than the first, so reread has no use; set one of them."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; fields that older versions do not know are left out where they have no effect."""
        out = dataclasses.asdict(self)
        for part, later in ((out, _LATER), (out["box"], _LATER_BOX)):
            for name, standard in later.items():
                if part[name] == standard:
                    del part[name]
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "zoom config") -> ZoomConfig:
        """The inverse of `to_dict`; files with the box rule's former words are read too.

        Raises:
            ConfigError: an unknown key (with the closest known one) or a bad value.
        """
        return from_mapping(cls, with_current_words(values), source)

    def replace(self, **changes: Any) -> ZoomConfig:
        """A copy with some fields changed; unknown names are refused with a hint."""
        refuse_unknown(type(self), changes, "zoom config")
        return dataclasses.replace(self, **changes)

    def with_preset(self, name: str) -> ZoomConfig:
        """The config with a named preset's thresholds.

        Raises:
            ConfigError: no preset of that name.
        """
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise ConfigError(f"No preset {name!r} in this checkpoint; known presets: {known}.")
        preset = self.presets[name]
        return self.replace(gate_threshold=preset.gate_threshold, region_threshold=preset.region_threshold)


_LATER = {
    "decide_by": "gate",
    "answer_tokens": 1,
    "map_rotary": True,
    "map_heads": "mean",
    "branch_norm": False,
    "reread": None,
    "tokens_per_cell": None,
}
_LATER_BOX = {
    "shares": "area",
    "too_many": "none",
    "min_cells": 1,
    "max_cells": None,
    "widen_cells": 0,
    "widen_to_edge": True,
    "sparse": None,
}
_FORMER_WORDS = {("threshold", "peak"): "relative", ("components", "peak"): "peak_component"}


def with_current_words(values: Any) -> Any:
    """A zoom config as read from a file, with the former words of its box rule replaced; other values pass as they are.

    `qzoom_config.json` files written before the words "relative" and "peak_component" have "peak" for both.
    """
    box = values.get("box") if isinstance(values, dict) else None
    if not isinstance(box, dict):
        return values
    words = {key: _FORMER_WORDS.get((key, word), word) if isinstance(word, str) else word for key, word in box.items()}
    return values | {"box": words}
