"""The record that passes through the pipeline, what is known about its image, and what a step is.

    image -> target -> question -> validation -> votes -> answer -> choices -> difficulty
    propose  propose    ask        validate     answer    vote     choices    difficulty

Every step fills in its own part. Propose makes several items of an image, ask several of a target, choices may add a
paired negative. A refused item stays in the data with the reason in `decisions`, so that every filter can be counted.
Boxes are xyxy in original pixels, half-open, of the upright image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qzoom.errors import CheckpointError, ConfigError, DataError, DeviceError, LaterError, QZoomError, StopRunError
from qzoom.store.schema import Box4, from_values

if TYPE_CHECKING:
    from qzoom.data.synthetic.page import SceneObject

ITEM_SCHEMA = 2
QuestionKind = Literal["counting", "ocr", "colour", "structure", "material", "identification", "spatial", "other"]


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A whole image."""

    digest: str  # twenty hex digits of a hash over its pixels as RGB (orientation applied) and its size
    source: str  # path below `root`, or "documents:SEED", "scenes:SEED"
    width: int  # pixels
    height: int  # pixels
    root: str = ""  # folder that a path starts from
    dataset: str = ""  # where it comes from, for the card


@dataclass(frozen=True, slots=True)
class TargetRegion:
    """A proposed region of the image."""

    box: Box4  # tight box of the target
    crop_box: Box4  # what teachers see: the box with its margin, clipped
    proposer: str  # which plug-in proposed it
    scale: float = 1.0  # by how much the crop is enlarged for them
    score: float = 1.0  # the proposer's own, 0 to 1
    phrase: str = ""  # the target in words; "" when unknown
    area_bin: int = 0  # index of the area bin that it was drawn for, 0 the smallest

    def area_share(self, picture: ImageRef) -> float:
        """Share of the picture that the tight box covers."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0) / (picture.width * picture.height)

    def normalised(self, picture: ImageRef) -> tuple[float, float, float, float]:
        """The tight box in shares of the picture's width and height."""
        x0, y0, x1, y1 = self.box
        return x0 / picture.width, y0 / picture.height, x1 / picture.width, y1 / picture.height


@dataclass(frozen=True, slots=True)
class QuestionDraft:
    """A question about a target."""

    text: str  # the question, which names no box
    kind: QuestionKind  # of the question
    writer: str  # model or rule that wrote it
    negative: bool = False  # the target is absent, or no listed option holds
    pair: str = ""  # id of the positive item that a negative belongs to; "" otherwise
    # right answer, where the question writer is a rule that knows it ("" otherwise); never shown to a teacher
    known: str = ""


@dataclass(frozen=True, slots=True)
class Vote:
    """One sample of one teacher."""

    teacher: str  # its name
    sample: int  # index among the teacher's samples
    text: str  # the answer extracted from its reply; "" when it abstained or failed
    # "answered", "abstained" (it said that it cannot tell), "failed" (no usable reply; never a vote), or "skipped" (not
    # asked, because no agreement was possible any more)
    status: Literal["answered", "abstained", "failed", "skipped"] = "answered"
    reason: str = ""  # why it failed


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreed answer."""

    text: str  # the answer, as most of them wrote it
    count: int  # votes for it
    votes: int  # answered votes in all, abstentions not among them
    by_teacher: tuple[tuple[str, int], ...]  # (teacher, votes for it), sorted by name
    by: str = "rule"  # "rule" or the judge that joined undecided answers


@dataclass(frozen=True, slots=True)
class Choices:
    """A multiple-choice form."""

    options: tuple[str, ...]  # texts in the order shown, A first
    letter: str  # the right one's
    writer: str  # model or rule that wrote the distractors


@dataclass(frozen=True, slots=True)
class Difficulty:
    """The student's pass rate on the training view."""

    passes: int  # right answers
    samples: int  # answers asked for and received
    student: str  # its name
    view: str  # overlay style of the view, "none" without a box


@dataclass(frozen=True, slots=True)
class Decision:
    """A step's decision about an item, with its reason."""

    step: str
    kept: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One training question on its way through the pipeline; parts that no step has filled yet are None or empty."""

    picture: ImageRef  # the whole image
    target: TargetRegion | None = None  # the region that the question is about
    draft: QuestionDraft | None = None  # the question
    votes: tuple[Vote, ...] = ()  # the teachers' answers from the crop
    answer: Agreement | None = None  # agreed on by the teachers
    choices: Choices | None = None  # multiple-choice form, for items that have one
    difficulty: Difficulty | None = None  # the student's pass rate
    decisions: tuple[Decision, ...] = ()  # in order, one per step that decided about it
    models: tuple[tuple[str, str], ...] = ()  # (role, model and weights) of every model that was asked
    seed: int = 0  # of everything that is drawn at random for it

    @property
    def id(self) -> str:
        """Twenty hex digits of a hash over image, tight box and question; paths, votes and settings do not count."""
        content = [
            self.picture.digest,
            None if self.target is None else [*self.target.box],
            None if self.draft is None else [self.draft.text, self.draft.negative],
        ]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def kept(self) -> bool:
        """Whether no step has refused it."""
        return all(decision.kept for decision in self.decisions)

    def decide(self, step: str, reason: str = "", *, note: str = "") -> Item:
        """The item with one more decision: refused for a reason, or kept, perhaps with a note."""
        return dataclasses.replace(self, decisions=(*self.decisions, Decision(step, not reason, reason or note)))

    def to_json(self) -> str:
        """One line, keys sorted, so that equal items are equal texts."""
        values = {"schema": ITEM_SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)


def item_from_values(values: Any, where: str) -> Item:
    """The item of what `Item.to_json` wrote (DataError: another schema, an unknown or missing field, or a value of the
    wrong type; it begins with `where`)."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, not {type(values).__name__}.")
    if values.get("schema") != ITEM_SCHEMA:
        raise DataError(f"{where}: items of schema {values.get('schema')!r}; this version reads schema {ITEM_SCHEMA}.")
    item: Item = from_values(Item, {key: value for key, value in values.items() if key != "schema"}, where)
    return item


LETTER_INSTRUCTION = "Answer with the option's letter."


def choice_text(question: str, options: Iterable[str]) -> str:
    """A question with its options, A first, and how to answer."""
    lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, LETTER_INSTRUCTION])


NONE_OPTION = "none of these"


@dataclass(frozen=True, slots=True)
class KnownQuestion:
    """A question that comes with the image, for roles by rule."""

    text: str  # the question
    answer: str  # the right answer; "" when unknown
    boxes: tuple[Box4, ...]  # of the answer, xyxy in original pixels; empty when unknown or absent
    field: str = ""  # of a drawn image that it asks for ("code", "total", ...); "" otherwise


@dataclass(frozen=True, slots=True)
class Known:
    """All that is known about an image without a model; empty for images that come alone."""

    questions: tuple[KnownQuestion, ...] = ()
    objects: tuple[SceneObject, ...] = ()  # of a drawn scene
    texts: tuple[tuple[str, Box4], ...] = ()  # printed lines of a drawn image, each with its box


Step: TypeAlias = Callable[[Item], Sequence[Item]]
"""Returns the item with its own part filled in, or several items; refused ones with their decision. It may raise
`StopRunError` (the run ends), `LaterError` (the item waits for a rerun), errors of settings, models and devices (the
run ends) or any other `QZoomError` (the item is refused for that reason)."""


def apply(name: str, step: Step, item: Item) -> tuple[Item, ...]:
    """Run the step of a name on an item; a refused one comes back untouched.

    Returns:
        The step's items. Of equal ids the later ones are refused, so that no two kept items have the same.

    Raises:
        StopRunError, LaterError, ConfigError, CheckpointError, DeviceError: as `Step`.
    """
    if not item.kept:
        return (item,)
    try:
        results = tuple(step(item))
    except (StopRunError, LaterError, ConfigError, CheckpointError, DeviceError):
        raise
    except QZoomError as error:
        return (item.decide(name, str(error) or type(error).__name__),)
    seen: set[str] = set()
    out = []
    for one in results:
        if one.kept and one.id in seen:
            one = one.decide(name, "the same as another item of this picture")
        if one.kept:
            seen.add(one.id)
        out.append(one)
    return tuple(out)


def with_model(item: Item, role: str, model: str) -> Item:
    """The item with a model added to `models`, once."""
    if not model or (role, model) in item.models:
        return item
    return dataclasses.replace(item, models=(*item.models, (role, model)))


def target_of(item: Item) -> TargetRegion:
    """The item's target (DataError: it has none)."""
    if item.target is None:
        raise DataError("This item has no target; run the step propose first.")
    return item.target


def draft_of(item: Item) -> QuestionDraft:
    """The item's question (DataError: it has none)."""
    if item.draft is None:
        raise DataError("This item has no question; run the step ask first.")
    return item.draft
