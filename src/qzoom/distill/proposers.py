"""What a proposer is, and the table of those there are.

Boxes that come with a picture: of its questions' answers, and of a drawn scene's objects.

Tiles of equal size that cover a picture.

qzoom's own region maps as proposals: where the model would look for what it is asked.

Any object detector of transformers: those that take words, and those with classes of their own.

The propose step: what the proposers name becomes items, those left out with their reason.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from qzoom.config import check_count, check_range
from qzoom.distill.items import Item, Region, Views
from qzoom.distill.select import SelectSettings, select
from qzoom.errors import CheckpointError, ConfigError, DataError
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from qzoom.model import QZoom

__all__ = [
    "PROPOSERS",
    "DetectorProposer",
    "DetectorSettings",
    "GivenProposer",
    "GivenSettings",
    "GridProposer",
    "GridSettings",
    "MapsProposer",
    "MapsSettings",
    "Proposal",
    "ProposeSettings",
    "ProposeStep",
    "Proposer",
    "make_propose_step",
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
    made: Proposer = globals()[_WHERE[name][1]](getattr(settings, name))
    return made


@dataclass(frozen=True, slots=True)
class GivenProposer:
    """See `qzoom.distill.proposers.Proposer`."""

    settings: GivenSettings
    name: str = "given"

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """Each box once, those of questions first."""
        known = views.known(item)
        found: dict[tuple[int, int, int, int], Proposal] = {}
        if self.settings.questions:
            for question in known.questions:
                for box in question.boxes:
                    found.setdefault(box, Proposal(box))
        if self.settings.objects:
            for thing in known.objects:
                named = Proposal(thing.box, phrase=f"{thing.colour} {thing.shape}")
                if not found.get(thing.box, Proposal(thing.box)).phrase:
                    found[thing.box] = named
        return tuple(found.values())


@dataclass(frozen=True, slots=True)
class GridProposer:
    """See `qzoom.distill.proposers.Proposer`."""

    settings: GridSettings
    name: str = "grid"

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """Row by row; the last tiles of a row and of a column end on the picture's edge."""
        across = _spans(item.picture.width, self.settings.columns, self.settings.overlap)
        down = _spans(item.picture.height, self.settings.rows, self.settings.overlap)
        return tuple(Proposal((x0, y0, x1, y1)) for y0, y1 in down for x0, x1 in across)


def _spans(side_px: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """Intervals of one length, each repeating a share of the one before."""
    length = side_px / (1 + (count - 1) * (1 - overlap))
    step = length * (1 - overlap)
    spans = [(round(i * step), min(side_px, round(i * step + length))) for i in range(count)]
    return [span for span in spans if span[1] > span[0]]


class MapsProposer:
    """See `qzoom.distill.proposers.Proposer`. The model is loaded at the first picture; one look at a time.

    Args:
        settings: which model, and what its maps are asked for.
    """

    name = "maps"

    def __init__(self, settings: MapsSettings) -> None:
        self.settings = settings
        self._model: QZoom | None = None
        self._lock = threading.Lock()

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """The regions of all questions, each box once with its best score.

        Raises:
            HeadsMissingError: the model has no region branch.
            CheckpointError: it cannot be loaded.
        """
        asked = list(self.settings.questions)
        if self.settings.own_questions:
            asked += [question.text for question in views.known(item).questions]
        found: dict[tuple[int, int, int, int], float] = {}
        image = views.whole(item)
        with self._lock:
            model = self._loaded()
            for question in dict.fromkeys(asked):
                seen = model.perceive(image, question, region_threshold=self.settings.region_threshold)
                for region in seen.regions:
                    found[region.box] = max(region.score, found.get(region.box, 0.0))
        return tuple(Proposal(box, score) for box, score in found.items())

    def _loaded(self) -> QZoom:
        if self._model is None:
            from qzoom.model import QZoom

            settings = self.settings
            self._model = QZoom.from_pretrained(settings.model, revision=settings.revision, device_map=settings.device)
        return self._model


class DetectorProposer:
    """See `qzoom.distill.proposers.Proposer`. The model is loaded at the first picture; one picture at a time.

    Args:
        settings: with phrases, a zero-shot detector (OWL-ViT, Grounding DINO); without, a plain one (DETR, RT-DETR).
    """

    name = "detector"

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._detect: Any = None
        self._lock = threading.Lock()

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """What is found, the best first.

        Raises:
            CheckpointError: the detector cannot be loaded.
        """
        image = views.whole(item)
        options: dict[str, Any] = {"threshold": self.settings.threshold}
        if self.settings.phrases:
            options["candidate_labels"] = list(self.settings.phrases)
        with self._lock:
            found = self._loaded()(image, **options)
        proposals = [
            Proposal(tuple(entry["box"][side] for side in _SIDES), float(entry["score"]), str(entry["label"]))
            for entry in found
        ]
        return tuple(sorted(proposals, key=lambda one: (-one.score, one.box, one.phrase)))

    def _loaded(self) -> Any:
        if self._detect is None:
            import torch
            import transformers

            settings = self.settings
            device = settings.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            task = "zero-shot-object-detection" if settings.phrases else "object-detection"
            try:
                make: Any = transformers.pipeline
                self._detect = make(
                    task, model=settings.model, revision=settings.revision, device=device, trust_remote_code=False
                )
            except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise CheckpointError(
                    f"The detector {settings.model} cannot be loaded for {task} ({reason}); name one of that kind, "
                    "with phrases only where it takes words."
                ) from error
        return self._detect


_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, slots=True)
class ProposeStep:
    """One item per proposed region; see `qzoom.distill.items.Step`."""

    proposers: tuple[Proposer, ...]
    views: Views
    settings: ProposeSettings
    seed: int = 0
    name: str = "propose"

    def __call__(self, item: Item) -> Sequence[Item]:
        """Items in the order of the proposers; a picture on which nothing is proposed is refused.

        Raises:
            ImageError: a proposer cannot open the picture.
            DataError: nothing was proposed.
        """
        named = [(proposer.name, one) for proposer in self.proposers for one in proposer(item, self.views)]
        if not named:
            raise DataError("nothing proposed")
        picture = item.picture
        boxes = [one.box for _, one in named]
        chosen = select(boxes, [one.score for _, one in named], (picture.width, picture.height), self.settings.select)
        out = []
        for (proposer, one), result in zip(named, chosen, strict=True):
            box = result.box if not result.reason else one.box
            score = round(min(1.0, max(0.0, one.score)), 6)
            region = Region(box, box, proposer, 1.0, score, one.phrase, result.area_bin)
            made = replace(item, region=region, seed=item_seed(self.seed, picture.digest, box))
            out.append(made.decide(self.name, not result.reason, result.reason))
        return out


def make_propose_step(settings: ProposeSettings, views: Views, seed: int) -> ProposeStep:
    """The step of a recipe; models are loaded when the first picture comes.

    Raises:
        ConfigError: an unknown proposer.
    """
    return ProposeStep(tuple(make_proposer(name, settings) for name in settings.by), views, settings, seed)


def item_seed(seed: int, digest: str, box: Sequence[int]) -> int:
    """The seed of all that is drawn for a region: 31 bits of a hash."""
    text = f"{seed}/{digest}/{','.join(map(str, box))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
