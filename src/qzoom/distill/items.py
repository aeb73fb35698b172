"""The one record of the pipeline: every step takes an item and gives the same item back with its own part filled in.

    picture -> region -> question -> validation -> votes -> answer -> choices -> difficulty
      propose   propose    ask        validate     answer     vote     choices    difficulty

Propose makes several items of a picture, ask several of a region, choices may add a paired negative; every other step
keeps one for one. A step that refuses an item says why in `decisions` and leaves it in the data, so that every filter
can be counted; later steps pass refused items on untouched. Boxes are xyxy in original pixels, half-open, of the
picture as a person sees it (EXIF orientation applied).

What a step is and what it may look at.

A step takes an item and gives one or several back. `apply` is how the pipeline calls it: refused items never reach a
step, an item that cannot be used becomes a refusal with its reason, and only what concerns the whole run gets out as
an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from qzoom.errors import CheckpointError, ConfigError, DataError, DeviceError, LaterError, QZoomError, StopRunError
from qzoom.store.schema import Box4, from_values

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ITEM_SCHEMA",
    "LETTER_INSTRUCTION",
    "NONE_OPTION",
    "STEPS",
    "Agreement",
    "Asked",
    "Choices",
    "Decision",
    "Difficulty",
    "Item",
    "Known",
    "KnownObject",
    "KnownQuestion",
    "KnownText",
    "Picture",
    "QuestionKind",
    "Region",
    "Step",
    "Views",
    "Vote",
    "apply",
    "choice_text",
    "item_from_json",
]


ITEM_SCHEMA = 1
STEPS = ("propose", "crop", "ask", "validate", "answer", "vote", "choices", "difficulty", "export")
QuestionKind = Literal["counting", "ocr", "colour", "structure", "material", "identification", "spatial", "other"]


@dataclass(frozen=True, slots=True)
class Picture:
    """A whole picture.

    Args:
        digest: twenty hex digits of a hash over its pixels as RGB (orientation applied) and its size.
        source: path below `root`, or "documents:SEED", "scenes:SEED".
        root: folder that a path starts from.
        width: pixels.
        height: pixels.
        dataset: where it comes from, for the card.
    """

    digest: str
    source: str
    width: int
    height: int
    root: str = ""
    dataset: str = ""


@dataclass(frozen=True, slots=True)
class Region:
    """A proposed place in the picture.

    Args:
        box: tight box of the target.
        crop_box: what teachers see: the box with its margin, clipped.
        scale: by how much the crop is enlarged for them.
        proposer: which plug-in proposed it.
        score: the proposer's own, 0 to 1.
        phrase: what it is, in words; "" when unknown.
        area_bin: index of the area bin that it was drawn for, 0 the smallest.
    """

    box: Box4
    crop_box: Box4
    proposer: str
    scale: float = 1.0
    score: float = 1.0
    phrase: str = ""
    area_bin: int = 0

    def area_share(self, picture: Picture) -> float:
        """Share of the picture that the tight box covers."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0) / (picture.width * picture.height)

    def normalised(self, picture: Picture) -> tuple[float, float, float, float]:
        """The tight box in shares of the picture's width and height."""
        x0, y0, x1, y1 = self.box
        return x0 / picture.width, y0 / picture.height, x1 / picture.width, y1 / picture.height


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a region.

    Args:
        text: the question, which names no box.
        kind: what it tests.
        asker: model or rule that wrote it.
        negative: the target is absent, or no listed option holds.
        pair: id of the positive item that a negative belongs to; "" otherwise.
        known: right answer, where the asker is a rule that knows it ("" otherwise); never shown to a teacher.
    """

    text: str
    kind: QuestionKind
    asker: str
    negative: bool = False
    pair: str = ""
    known: str = ""


@dataclass(frozen=True, slots=True)
class Vote:
    """One sample of one teacher.

    Args:
        teacher: its name.
        sample: index among the teacher's samples.
        text: the answer extracted from its reply; "" when it abstained or failed.
        status: "answered", "abstained" (it said that it cannot tell), "failed" (no usable reply; never a vote), or
            "skipped" (not asked, since no agreement was possible any more).
        reason: why it failed.
    """

    teacher: str
    sample: int
    text: str
    status: Literal["answered", "abstained", "failed", "skipped"] = "answered"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the teachers agree on.

    Args:
        text: the answer, as most of them wrote it.
        count: votes for it.
        votes: answered votes in all, abstentions not among them.
        by_teacher: (teacher, votes for it), sorted by name.
        by: "rule" or the judge that joined undecided answers.
    """

    text: str
    count: int
    votes: int
    by_teacher: tuple[tuple[str, int], ...]
    by: str = "rule"


@dataclass(frozen=True, slots=True)
class Choices:
    """A multiple-choice form.

    Args:
        options: texts in the order shown, A first.
        letter: the right one's.
        maker: model or rule that wrote the distractors.
    """

    options: tuple[str, ...]
    letter: str
    maker: str


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How often the student is right on the training view.

    Args:
        passes: right answers.
        samples: answers asked for and received.
        student: its name.
        view: overlay style of the view, "none" without a box.
    """

    passes: int
    samples: int
    student: str
    view: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What a step decided about an item, and why."""

    step: str
    kept: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One training question on its way through the pipeline; parts that no step has filled yet are None or empty.

    Args:
        picture: the whole picture.
        region: the place the question is about.
        asked: the question.
        votes: what teachers answered on the crop.
        answer: what they agree on.
        choices: multiple-choice form, for items that have one.
        difficulty: the student's pass rate.
        decisions: in order, one per step that judged it.
        models: (role, model and weights) of every model that took part.
        seed: of everything drawn for it.
    """

    picture: Picture
    region: Region | None = None
    asked: Asked | None = None
    votes: tuple[Vote, ...] = ()
    answer: Agreement | None = None
    choices: Choices | None = None
    difficulty: Difficulty | None = None
    decisions: tuple[Decision, ...] = ()
    models: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    @property
    def id(self) -> str:
        """Twenty hex digits of a hash over what the item is about: picture, tight box and question. Paths, votes and
        settings do not change it."""
        content = [
            self.picture.digest,
            None if self.region is None else [*self.region.box],
            None if self.asked is None else [self.asked.text, self.asked.negative],
        ]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def kept(self) -> bool:
        """Whether no step has refused it."""
        return all(decision.kept for decision in self.decisions)

    def decide(self, step: str, kept: bool, reason: str = "") -> Item:
        """The item with one more decision."""
        return dataclasses.replace(self, decisions=(*self.decisions, Decision(step, kept, reason)))

    def to_json(self) -> str:
        """One line, keys sorted, so that equal items are equal texts."""
        values = {"schema": ITEM_SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)


def item_from_json(line: str, where: str) -> Item:
    """The item of a line.

    Args:
        line: what `Item.to_json` wrote.
        where: file and line number, for complaints.

    Raises:
        DataError: broken JSON, another schema, an unknown or missing field, or a value of the wrong type.
    """
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, not {type(values).__name__}.")
    schema = values.pop("schema", None)
    if schema != ITEM_SCHEMA:
        raise DataError(f"{where}: items of schema {schema!r}; this version reads schema {ITEM_SCHEMA}.")
    item: Item = from_values(Item, values, where)
    return item


LETTER_INSTRUCTION = "Answer with the option's letter."


def choice_text(question: str, options: Iterable[str]) -> str:
    """A question with its options, A first, and how to answer."""
    lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, LETTER_INSTRUCTION])


NONE_OPTION = "none of these"


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
