"""What a proposer is, and the table of those there are."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qzoom.config import check_count, check_range
from qzoom.distill.propose.select import SelectSettings
from qzoom.distill.records import Item
from qzoom.distill.steps import Views
from qzoom.errors import ConfigError
from qzoom.records.schema import Box4

__all__ = [
    "PROPOSERS",
    "DetectorSettings",
    "GivenSettings",
    "GridSettings",
    "MapsSettings",
    "Proposal",
    "ProposeSettings",
    "Proposer",
    "make_proposer",
]

_WHERE = {
    "given": ("given", "GivenProposer"),
    "grid": ("grid", "GridProposer"),
    "maps": ("maps", "MapsProposer"),
    "detector": ("detector", "DetectorProposer"),
}
PROPOSERS = tuple(_WHERE)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A box that may be worth asking about.

    Args:
        box: xyxy in original pixels; it may reach over the picture's edge.
        score: 0 to 1.
        phrase: what is there, in words; "" when unknown.
    """

    box: Box4
    score: float = 1.0
    phrase: str = ""


class Proposer(Protocol):
    """Names boxes on a picture. Threads may share it."""

    @property
    def name(self) -> str:
        """As in the recipe."""
        ...

    def __call__(self, item: Item, views: Views) -> Sequence[Proposal]:
        """Boxes of the picture of an item that has no region yet, in an order that does not change."""
        ...


@dataclass(frozen=True, slots=True)
class GivenSettings:
    """Boxes that come with the picture.

    Args:
        questions: those that hold the answers of its questions.
        objects: those of a drawn scene's objects.
    """

    questions: bool = True
    objects: bool = True


@dataclass(frozen=True, slots=True)
class GridSettings:
    """Tiles.

    Args:
        columns: tiles side by side.
        rows: tiles above each other.
        overlap: share of a tile's side that its neighbour repeats.
    """

    columns: int = 4
    rows: int = 4
    overlap: float = 0.0

    def __post_init__(self) -> None:
        check_count(self, "columns", 1, 100)
        check_count(self, "rows", 1, 100)
        check_range(self, "overlap", 0, 0.9)


@dataclass(frozen=True, slots=True)
class MapsSettings:
    """Region maps of a model with zoom heads.

    Args:
        model: "tiny", a hub id or a folder.
        revision: of the hub.
        questions: what its maps are asked for.
        own_questions: also the questions that come with the picture.
        region_threshold: None takes the checkpoint's.
        device: "cpu", "cuda" or "auto".
    """

    model: str = "tiny"
    revision: str | None = None
    questions: tuple[str, ...] = ("What is written in fine print?",)
    own_questions: bool = False
    region_threshold: float | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """An object detector of transformers.

    Args:
        model: hub id or folder.
        revision: of the hub.
        phrases: what is looked for, by detectors that take words; empty for detectors with classes of their own.
        threshold: lowest score.
        device: "cpu", "cuda" or "auto".
    """

    model: str = ""
    revision: str | None = None
    phrases: tuple[str, ...] = ()
    threshold: float = 0.3
    device: str = "auto"

    def __post_init__(self) -> None:
        check_range(self, "threshold", 0, 1)


@dataclass(frozen=True, slots=True)
class ProposeSettings:
    """Which proposers, and what is kept of what they name.

    Args:
        by: names of proposers, in order: given, grid, maps, detector.
        given: settings of "given".
        grid: settings of "grid".
        maps: settings of "maps".
        detector: settings of "detector".
        select: what is kept.

    Raises:
        ConfigError: an unknown proposer, or a detector without a model.
    """

    by: tuple[str, ...] = ("given",)
    given: GivenSettings = field(default_factory=GivenSettings)
    grid: GridSettings = field(default_factory=GridSettings)
    maps: MapsSettings = field(default_factory=MapsSettings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    select: SelectSettings = field(default_factory=SelectSettings)

    def __post_init__(self) -> None:
        for name in self.by:
            if name not in PROPOSERS:
                raise ConfigError(f"propose.by: unknown proposer {name!r}; known: {', '.join(PROPOSERS)}.")
        if not self.by or len(set(self.by)) != len(self.by):
            raise ConfigError("propose.by needs at least one proposer, and none twice.")
        if "detector" in self.by and not self.detector.model:
            raise ConfigError("propose.detector.model is missing; name a hub id or a folder with a detector.")


def make_proposer(name: str, settings: ProposeSettings) -> Proposer:
    """The proposer of a name; models are loaded when it is first called.

    Raises:
        ConfigError: no such proposer.
    """
    if name not in PROPOSERS:
        raise ConfigError(f"Unknown proposer {name!r}; known: {', '.join(PROPOSERS)}.")
    module, kind = _WHERE[name]
    made: Proposer = getattr(importlib.import_module(f"qzoom.distill.propose.{module}"), kind)(getattr(settings, name))
    return made
