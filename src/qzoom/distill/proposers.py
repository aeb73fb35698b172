"""Step propose: boxes that may be worth asking about become items, those left out with their reason.

Proposers: "given" (boxes that come with the image), "grid" (tiles of equal size), "maps" (region maps of a model with
zoom heads) and "detector" (an object detector of transformers).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from qzoom.data.crop import CropSettings, crop_box, crop_scale
from qzoom.distill.items import Item, Step, TargetRegion
from qzoom.distill.select import SelectSettings, select
from qzoom.errors import CheckpointError, ConfigError, DataError
from qzoom.images.geometry import box_area_px
from qzoom.settings import Between, Share, settings
from qzoom.store.schema import Box4

if TYPE_CHECKING:
    from qzoom.distill.pictures import Views
    from qzoom.model import QZoom


@dataclass(frozen=True, slots=True)
class Proposal:
    """A box that may be worth asking about."""

    box: Box4  # xyxy in original pixels; it may extend beyond the image
    score: float = 1.0  # 0 to 1
    phrase: str = ""  # the content in words; "" when unknown


Proposer: TypeAlias = "Callable[[Item, Views], Sequence[Proposal]]"
"""Boxes on the image of an item that has no target yet, in a fixed order. Threads may share it."""


@settings
class GivenSettings:
    """Boxes that come with the image."""

    questions: bool = True
    """Boxes that hold the answers of its questions."""
    objects: bool = True
    """Boxes of a drawn scene's objects."""


@settings
class GridSettings:
    """Tiles of equal size."""

    columns: Annotated[int, Between(1, 100)] = 4
    """Tiles side by side."""
    rows: Annotated[int, Between(1, 100)] = 4
    """Tiles above each other."""
    overlap: Annotated[float, Between(0, 0.9)] = 0.0
    """Share of a tile's side that its neighbour repeats."""


@settings
class MapsSettings:
    """Region maps of a model with zoom heads."""

    model: str = "tiny"
    """"tiny", a hub id or a folder."""
    revision: str | None = None
    """Revision on the hub."""
    questions: tuple[str, ...] = ("What is written in fine print?",)
    """Questions that the maps are computed for."""
    own_questions: bool = False
    """Also use the questions that come with the image."""
    region_threshold: float | None = None
    """Threshold of the maps; null takes the checkpoint's."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""


@settings
class DetectorSettings:
    """An object detector of transformers."""

    model: str = ""
    """Hub id or folder."""
    revision: str | None = None
    """Revision on the hub."""
    phrases: tuple[str, ...] = ()
    """What is looked for, by zero-shot detectors (OWL-ViT, Grounding DINO); empty for detectors with classes of their
    own (DETR, RT-DETR)."""
    threshold: Share = 0.3
    """Lowest score."""
    device: str = "auto"
    """"cpu", "cuda" or "auto"."""


@settings
class ProposeSettings:
    """Proposers, and which of their boxes are kept."""

    by: tuple[Literal["given", "grid", "maps", "detector"], ...] = ("given",)
    """Proposers, in order."""
    given: GivenSettings = field(default_factory=GivenSettings)
    """Settings of "given"."""
    grid: GridSettings = field(default_factory=GridSettings)
    """Settings of "grid"."""
    maps: MapsSettings = field(default_factory=MapsSettings)
    """Settings of "maps"."""
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    """Settings of "detector"."""
    select: SelectSettings = field(default_factory=SelectSettings)
    """Which boxes are kept."""

    def __post_init__(self) -> None:
        if not self.by or len(set(self.by)) != len(self.by):
            raise ConfigError("by needs at least one proposer, and none twice.")
        if "detector" in self.by and not self.detector.model:
            raise ConfigError("detector.model is missing; name a hub id or a folder with a detector.")


def make_proposer(name: str, recipe: ProposeSettings) -> Proposer:
    """The proposer of a name; models are loaded when it is first called."""
    makers: dict[str, Callable[[], Proposer]] = {
        "given": lambda: partial(given_boxes, recipe.given),
        "grid": lambda: partial(grid_boxes, recipe.grid),
        "maps": lambda: MapsProposer(recipe.maps),
        "detector": lambda: DetectorProposer(recipe.detector),
    }
    return makers[name]()


def given_boxes(given: GivenSettings, item: Item, views: Views) -> tuple[Proposal, ...]:
    """Boxes that come with the image, each once, those of questions first."""
    known = views.known(item)
    boxes: dict[Box4, Proposal] = {}
    if given.questions:
        for question in known.questions:
            for box in question.boxes:
                boxes.setdefault(box, Proposal(box))
    if given.objects:
        for thing in known.objects:
            if not boxes.get(thing.box, Proposal(thing.box)).phrase:
                boxes[thing.box] = Proposal(thing.box, phrase=f"{thing.colour} {thing.shape}")
    return tuple(boxes.values())


def grid_boxes(grid: GridSettings, item: Item, views: Views) -> tuple[Proposal, ...]:
    """Tiles row by row; the last tiles of a row and of a column end at the image's edge."""
    across = _spans(item.picture.width, grid.columns, grid.overlap)
    down = _spans(item.picture.height, grid.rows, grid.overlap)
    return tuple(Proposal((x0, y0, x1, y1)) for y0, y1 in down for x0, x1 in across)


def _spans(side_px: int, count: int, overlap: float) -> list[tuple[int, int]]:
    """Intervals of one length, each repeating a share of the one before."""
    length = side_px / (1 + (count - 1) * (1 - overlap))
    step = length * (1 - overlap)
    spans = [(round(i * step), min(side_px, round(i * step + length))) for i in range(count)]
    return [span for span in spans if span[1] > span[0]]


class MapsProposer:
    """Region maps of a model for given questions, as proposals.

    The model is loaded at the first image; one image at a time.

    Args:
        settings: the model and its questions.
    """

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
        questions = list(self.settings.questions)
        if self.settings.own_questions:
            questions += [question.text for question in views.known(item).questions]
        scores: dict[Box4, float] = {}
        image = views.whole(item)
        with self._lock:
            model = self._loaded()
            for question in dict.fromkeys(questions):
                perception = model.perceive(image, question, region_threshold=self.settings.region_threshold)
                for region in perception.regions:
                    scores[region.box] = max(region.score, scores.get(region.box, 0.0))
        return tuple(Proposal(box, score) for box, score in scores.items())

    def _loaded(self) -> QZoom:
        if self._model is None:
            from qzoom.model import QZoom

            settings = self.settings
            self._model = QZoom.from_pretrained(settings.model, revision=settings.revision, device_map=settings.device)
        return self._model


class DetectorProposer:
    """An object detector of transformers, with phrases or with classes of its own.

    The model is loaded at the first image; one image at a time.

    Args:
        settings: with phrases, a zero-shot detector (OWL-ViT, Grounding DINO); without, a plain one (DETR, RT-DETR).
    """

    def __init__(self, settings: DetectorSettings) -> None:
        self.settings = settings
        self._detect: Any = None
        self._lock = threading.Lock()

    def __call__(self, item: Item, views: Views) -> tuple[Proposal, ...]:
        """Detections, the best first.

        Raises:
            CheckpointError: the detector cannot be loaded.
        """
        image = views.whole(item)
        options: dict[str, Any] = {"threshold": self.settings.threshold}
        if self.settings.phrases:
            options["candidate_labels"] = list(self.settings.phrases)
        with self._lock:
            detections = self._loaded()(image, **options)
        proposals = [
            Proposal(tuple(entry["box"][side] for side in _SIDES), float(entry["score"]), str(entry["label"]))
            for entry in detections
        ]
        return tuple(sorted(proposals, key=lambda one: (-one.score, one.box, one.phrase)))

    def _loaded(self) -> Any:
        if self._detect is None:
            import transformers

            from qzoom.checkpoints.base import choose_device

            settings = self.settings
            device = str(choose_device("auto")) if settings.device == "auto" else settings.device
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


def propose_step(
    recipe: ProposeSettings, views: Views, seed: int, proposers: dict[str, Proposer] | None = None
) -> Step:
    """One item for every proposed box; an image on which nothing is proposed is refused.

    Args:
        recipe: proposers and selection.
        views: what proposers may look at.
        seed: of the recipe.
        proposers: by name, in order; None makes those of the recipe.
    """
    used = proposers or {name: make_proposer(name, recipe) for name in recipe.by}

    def run(item: Item) -> Sequence[Item]:
        named = [(name, proposal) for name, proposer in used.items() for proposal in proposer(item, views)]
        if not named:
            raise DataError("nothing proposed")
        picture = item.picture
        boxes, scores = [one.box for _, one in named], [one.score for _, one in named]
        selected = select(boxes, scores, (picture.width, picture.height), recipe.select)
        out = []
        for (name, proposal), (clipped, area_bin, reason) in zip(named, selected, strict=True):
            box = proposal.box if reason else clipped
            score = round(min(1.0, max(0.0, proposal.score)), 6)
            target = TargetRegion(box, box, name, 1.0, score, proposal.phrase, area_bin)
            proposed = replace(item, target=target, seed=item_seed(seed, picture.digest, box))
            out.append(proposed.decide("propose", reason))
        return out

    return Step("propose", run)


def crop_step(crop: CropSettings) -> Step:
    """Fills in the target's `crop_box` and `scale`; a target outside the image is refused."""

    def run(item: Item) -> Sequence[Item]:
        if item.target is None:
            raise DataError("no region to crop")
        box = crop_box(item.target.box, (item.picture.width, item.picture.height), crop)
        if box_area_px(box) == 0:
            raise DataError("the box lies outside the picture")
        target = replace(item.target, crop_box=box, scale=crop_scale(box, crop))
        return (replace(item, target=target).decide("crop"),)

    return Step("crop", run)


def item_seed(seed: int, digest: str, box: Sequence[int]) -> int:
    """The seed of all that is drawn for a region: 31 bits of a hash."""
    text = f"{seed}/{digest}/{','.join(map(str, box))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
