"""Step propose: boxes that may be worth asking about become items, those left out with their reason.

Kept are boxes inside an area band, large enough to see, few of each size, without duplicates. Sizes are drawn from bins
of equal ratio, so that small and less small targets both come.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from qzoom.checkpoints.base import choose_device
from qzoom.data.crop import CropSettings, crop_box, crop_scale
from qzoom.distill.items import Item, Step, TargetRegion
from qzoom.errors import CheckpointError, ConfigError, DataError, reason_of
from qzoom.images.geometry import box_area_px, clip_box, iou
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


Count = Annotated[int, Between(1, 10_000)]
AreaShare = Annotated[float, Between(1e-9, 1)]


@settings
class SelectSettings:
    """Limits of the boxes that are kept."""

    min_share: AreaShare = 1e-5
    """Smallest share of the image's area."""
    max_share: AreaShare = 0.1
    """Largest share of the image's area; 0.1 is the paper's."""
    bins: Count = 3
    """Size bins of equal ratio inside the band."""
    per_bin: Count = 4
    """Most boxes of a bin."""
    per_picture: Count = 8
    """Most boxes of an image, taken from the bins in turn."""
    min_side_px: Count = 12
    """Shortest side of a box."""
    min_tokens: Annotated[float, Between(0, 1e6)] = 1.0
    """Fewest visual tokens that its pixels make."""
    token_px: Count = 28
    """Side of one visual token in pixels."""
    max_overlap: Share = 0.5
    """A box whose intersection over union with a better one is above this is left out."""
    max_aspect: Annotated[float, Between(1, 1e4)] = 20.0
    """Longest side over shortest side, at most."""

    def __post_init__(self) -> None:
        if self.min_share >= self.max_share:
            raise ConfigError(f"min_share {self.min_share} leaves no room below max_share {self.max_share}.")


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
        "given": lambda: functools.partial(given_boxes, recipe.given),
        "grid": lambda: functools.partial(grid_boxes, recipe.grid),
        "maps": lambda: maps_proposer(recipe.maps),
        "detector": lambda: detector_proposer(recipe.detector),
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


def maps_proposer(settings: MapsSettings) -> Proposer:
    """The regions that a model with zoom heads finds for given questions, each box once with its best score.

    The model is loaded at the first image; one image at a time. The proposer raises HeadsMissingError for a model
    without a region branch, and CheckpointError for one that cannot be loaded.
    """
    lock = threading.Lock()

    @functools.cache
    def model() -> QZoom:
        from qzoom.model import QZoom

        return QZoom.from_pretrained(settings.model, revision=settings.revision, device_map=settings.device)

    def propose(item: Item, views: Views) -> tuple[Proposal, ...]:
        questions = list(settings.questions)
        if settings.own_questions:
            questions += [question.text for question in views.known(item).questions]
        scores: dict[Box4, float] = {}
        image = views.whole(item)
        with lock:
            for question in dict.fromkeys(questions):
                perception = model().perceive(image, question, region_threshold=settings.region_threshold)
                for region in perception.regions:
                    scores[region.box] = max(region.score, scores.get(region.box, 0.0))
        return tuple(Proposal(box, score) for box, score in scores.items())

    return propose


def detector_proposer(settings: DetectorSettings) -> Proposer:
    """The detections of an object detector of transformers, the best first.

    With phrases it is a zero-shot detector (OWL-ViT, Grounding DINO), without them one with classes of its own (DETR,
    RT-DETR). It is loaded at the first image; one image at a time. The proposer raises CheckpointError for a detector
    that cannot be loaded.
    """
    lock = threading.Lock()
    options: dict[str, Any] = {"threshold": settings.threshold}
    if settings.phrases:
        options["candidate_labels"] = list(settings.phrases)

    @functools.cache
    def detector() -> Any:
        import transformers

        device = str(choose_device("auto")) if settings.device == "auto" else settings.device
        task = "zero-shot-object-detection" if settings.phrases else "object-detection"
        make: Any = transformers.pipeline
        try:
            return make(task, model=settings.model, revision=settings.revision, device=device, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = reason_of(error)
            raise CheckpointError(
                f"The detector {settings.model} cannot be loaded for {task} ({reason}); name one of that kind, "
                "with phrases only where it takes words."
            ) from error

    def propose(item: Item, views: Views) -> tuple[Proposal, ...]:
        image = views.whole(item)
        with lock:
            detections = detector()(image, **options)
        proposals = [
            Proposal(tuple(entry["box"][side] for side in _SIDES), float(entry["score"]), str(entry["label"]))
            for entry in detections
        ]
        return tuple(sorted(proposals, key=lambda one: (-one.score, one.box, one.phrase)))

    return propose


_SIDES = ("xmin", "ymin", "xmax", "ymax")


def propose_step(recipe: ProposeSettings, views: Views, seed: int) -> Step:
    """One item for every proposed box; an image on which nothing is proposed is refused."""
    proposers = {name: make_proposer(name, recipe) for name in recipe.by}

    def run(item: Item) -> Sequence[Item]:
        named = [(name, proposal) for name, proposer in proposers.items() for proposal in proposer(item, views)]
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

    return run


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

    return run


def item_seed(seed: int, digest: str, box: Sequence[int]) -> int:
    """The seed of all that is drawn for a region: 31 bits of a hash."""
    text = f"{seed}/{digest}/{','.join(map(str, box))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


# -- selection ------------------------------------------------------------------------------------------------------


def select(
    boxes: Sequence[Box4], scores: Sequence[float], size_px: tuple[int, int], settings: SelectSettings
) -> list[tuple[Box4, int, str]]:
    """Decide about each box: those with a high score come first, of equal ones the earlier.

    Returns:
        Of each box, in order: the box clipped to the image, its size bin (0 the smallest; 0 also outside the band), and
        why it is left out ("" for one that is kept).
    """
    clipped = [clip_box(box, size_px) for box in boxes]
    reasons = [_unfit(box, size_px, settings) for box in clipped]
    bins = [0 if reason else area_bin(box, size_px, settings) for box, reason in zip(clipped, reasons, strict=True)]
    queues: list[list[int]] = [[] for _ in range(settings.bins)]
    kept: list[int] = []
    for index in sorted((i for i, reason in enumerate(reasons) if not reason), key=lambda i: (-scores[i], i)):
        if any(iou(clipped[index], clipped[other]) > settings.max_overlap for other in kept):
            reasons[index] = "overlaps a better one"
            continue
        kept.append(index)
        queue = queues[bins[index]]
        if len(queue) == settings.per_bin:
            reasons[index] = "enough of its size"
        else:
            queue.append(index)
    for index in _beyond(queues, settings.per_picture):
        reasons[index] = "enough of this picture"
    return list(zip(clipped, bins, reasons, strict=True))


def area_bin(box: Box4, size_px: tuple[int, int], settings: SelectSettings) -> int:
    """The size bin of a box inside the band."""
    share = box_area_px(box) / (size_px[0] * size_px[1])
    span = math.log(settings.max_share / settings.min_share)
    return min(settings.bins - 1, max(0, int(settings.bins * math.log(share / settings.min_share) / span)))


def _unfit(box: Box4, size_px: tuple[int, int], settings: SelectSettings) -> str:
    """Why a clipped box cannot be used by itself; "" when it can."""
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return "outside the picture"
    share = width * height / (size_px[0] * size_px[1])
    if share < settings.min_share:
        return "smaller than the area band"
    if share > settings.max_share:
        return "larger than the area band"
    if min(width, height) < settings.min_side_px:
        return "too few pixels"
    if width * height < settings.min_tokens * settings.token_px**2:
        return "too few visual tokens"
    if max(width, height) > settings.max_aspect * min(width, height):
        return "too long and thin"
    return ""


def _beyond(queues: list[list[int]], most: int) -> list[int]:
    """Indices left over when `most` are taken from the queues in turn."""
    turns = [(turn, number, index) for number, queue in enumerate(queues) for turn, index in enumerate(queue)]
    return [index for _, _, index in sorted(turns)[most:]]
