"""Settings of the labels of each stage: the recipe keys and options of `qzoom label`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from qzoom.errors import ConfigError
from qzoom.settings import Between, Positive, Share, settings

View = Literal["dynamic", "square"]
Pairs = tuple[tuple[int, int], ...]
_Count = Annotated[int, Between(1, None)]


def parse_heads(text: str) -> Pairs:
    """Heads as "22:1,4 23:6,11" (layer, then its heads) (ConfigError: written in another way)."""
    pairs = []
    for part in text.split():
        if not re.fullmatch(r"\d{1,3}:\d{1,3}(,\d{1,3})*", part):
            raise ConfigError(f"{text!r} does not name heads; write LAYER:HEAD,HEAD such as '22:1,4 23:6,11'.")
        layer, heads = part.split(":")
        pairs += [(int(layer), int(head)) for head in heads.split(",")]
    if not pairs:
        raise ConfigError("No heads are named; write LAYER:HEAD,HEAD such as '22:1,4 23:6,11'.")
    return tuple(dict.fromkeys(pairs))


@settings
class LabelMapSettings:
    """Thresholds of a ternary label map; the defaults are those of the release's stage-1 script."""

    sink_threshold: float = 1e-2
    """Cells whose sink attention reaches this are taken out of the grounding map."""
    foreground: Share = 0.25
    """Share of the map's maximum above which a cell is foreground (tau_fg)."""
    background: Share = 0.05
    """Share of the maximum below which a cell outside the box is background (tau_bg)."""
    blur_cells: int = 3
    """Width of the blur that widens the box; even widths grow by one, widths below 1 mean no blur."""
    ignore_share: Share = 0.5
    """A box of at least this share of the map makes the map unusable."""
    min_peak: float = 5e-3
    """A maximum below this makes the map unusable."""

    @property
    def reach_cells(self) -> int:
        """How far the blur carries foreground, in cells on every side."""
        return max(1, self.blur_cells) // 2


@settings
class HeadSearch:
    """How attention heads are searched with synthetic images."""

    pictures: _Count = 40
    """Number of images."""
    questions: _Count = 4
    """Maximum number of questions about each image."""
    count: _Count = 3
    """Number of heads to take."""


@settings
class RegionRecipe:
    """Labels of stage 1: `qzoom label regions`."""

    source: Literal["answers", "boxes"] = "answers"
    """answers: the attention of the model's own answers; boxes: the known answer boxes of the questions."""
    heads: str = "auto"
    """auto (found with synthetic images), preset (the authors' tables), or '22:1,4 23:6,11' (layer:heads)."""
    tokens: Annotated[int, Between(4, None)] = 576
    """Number of visual tokens of the image."""
    view: View = "dynamic"
    """dynamic: the image with its own shape and at most `tokens`; square: padded with grey to a square of exactly
    `tokens`."""
    max_new_tokens: Annotated[int, Between(2, None)] = 128
    """Maximum number of tokens of an answer."""
    sink_by: Literal["norm", "heads", "none"] = "norm"
    """What finds sinks: hidden-state norms, heads (where sink heads are known, else nothing), or nothing."""
    sink_heads: str = ""
    """Heads that show sinks, written like `heads`; empty takes those of the preset."""
    sink_ratio: Positive = 3.0
    """With `sink_by: norm`: a sink's norm exceeds this many medians."""
    sink_layers: _Count = 3
    """With `sink_by: norm`: the layer after which hidden states are taken."""
    box_prompt: bool = True
    """Also ask for the bounding box in questions of mode `natural`."""
    maps: LabelMapSettings = LabelMapSettings()
    """Thresholds of the label maps."""
    search: HeadSearch = HeadSearch()
    """How heads are found with `heads: auto`."""

    def __post_init__(self) -> None:
        for text in ({self.heads} - {"auto", "preset"}) | ({self.sink_heads} - {""}):
            parse_heads(text)
        if self.view == "square" and int(self.tokens**0.5) ** 2 != self.tokens:
            raise ConfigError(f"A square view needs a square number of tokens such as 576, not {self.tokens}.")


@settings
class GateRecipe:
    """Labels of stage 3: `qzoom label gate`."""

    by: Literal["resolution", "zoom"] = "resolution"
    """resolution: answers at increasing resolutions (docs/method.md 8); zoom: the coarse answer against the zoomed
    one."""
    tokens: tuple[_Count, ...] = (64, 128, 256, 512)
    """Visual tokens of the coarse view: at least three increasing levels; by zoom, one of them is drawn per image."""
    max_new_tokens: _Count = 32
    """Maximum number of tokens of an answer."""

    def __post_init__(self) -> None:
        levels = list(self.tokens)
        if self.by == "resolution" and (len(levels) < 3 or levels != sorted(set(levels))):
            raise ConfigError(f"Labels by resolution need three or more rising numbers of visual tokens, not {levels}.")
        if not levels:
            raise ConfigError("Labels by zoom need at least one number of visual tokens.")


@settings
class HardCaseRecipe:
    """Labels of stage 2: `qzoom label hard-cases`."""

    coarse_tokens: Annotated[int, Between(4, None)] = 576
    """Maximum number of visual tokens of the coarse view."""
    region_tokens: _Count = 576
    """Maximum number of visual tokens of the regions."""
    max_new_tokens: _Count = 128
    """Maximum number of tokens of an answer."""
    aligned: bool = True
    """Use aligned positions for regions, as stage 2 trains them, instead of the checkpoint's; LLaVA has none."""
