"""The records: one frozen class per kind, checked on the way in, named by a hash of their content.

    question -> response -> attention -> region_label        stage 1
    question -> ladder, or zoom_comparison                    stage 3
    question -> verdict                                       stage 2
    question -> skip                                          what could not be used, and why

Arrows are ids: a record names the one it was made from. Boxes are xyxy in original pixels, half-open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Union

import numpy as np

from qzoom.errors import DataError

SCHEMA = 1
Pairs = tuple[tuple[int, int], ...]
Box4 = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made the records of a store."""

    model: str
    weights: str = ""  # digest of the base model's weights; "" when unknown (published labels)
    revision: str | None = None
    prompt: str = ""  # how questions were put
    seed: int = 0  # of everything drawn
    sizes: dict[str, Any] = field(default_factory=dict)  # visual tokens and the like


@dataclass(frozen=True, slots=True)
class Turn:
    """One question about a picture."""

    question: str
    answers: tuple[str, ...] = ()  # right answers, any of which counts; empty when unknown
    boxes: tuple[Box4, ...] = ()  # places that hold the answer, xyxy in original pixels; empty when unknown


@dataclass(frozen=True, slots=True)
class Record:
    """What every kind has in common."""

    kind: ClassVar[str] = ""
    tensors: ClassVar[dict[str, str]] = {}

    def values(self) -> dict[str, Any]:
        """Plain JSON types."""
        return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False)))


@dataclass(frozen=True, slots=True)
class Question(Record):
    """A picture and what is asked about it."""

    kind: ClassVar[str] = "question"
    name: str  # the user's id
    image: str  # path below `root`, or "documents:SEED", "scenes:SEED"
    turns: tuple[Turn, ...]
    # "text" or "natural": which attention heads are used, and how the question is asked
    mode: Literal["text", "natural"] = "text"
    source: str = ""  # which data set
    root: str = ""  # folder that a path starts from


@dataclass(frozen=True, slots=True)
class Response(Record):
    """What the model answered to one turn."""

    kind: ClassVar[str] = "response"
    question: str
    turn: int
    prompt: str  # the text that was asked
    text: str
    tokens: tuple[int, ...]  # its ids
    picture_px: tuple[int, int]  # (width, height) of the picture as it was shown, padding included
    grid: tuple[int, int]  # (rows, columns) of the view
    view: Literal["dynamic", "square"] = "dynamic"  # "dynamic", or "square" when padded to one


@dataclass(frozen=True, slots=True)
class Attention(Record):
    """Attention of a response. Tensors: `grounding` and `sink`, (rows, columns) float32."""

    kind: ClassVar[str] = "attention"
    tensors: ClassVar[dict[str, str]] = {"grounding": "float32", "sink": "float32"}
    response: str
    heads: Pairs  # (layer, head) pairs of the grounding map
    sink_by: Literal["norm", "heads", "none"] = "none"  # "norm" of hidden states, "heads", or "none"
    sink_heads: Pairs = ()  # (layer, head) pairs of the sink map


@dataclass(frozen=True, slots=True)
class RegionLabel(Record):
    """Tri-state labels of one turn. Tensor: `labels`, (rows, columns) int8: 1, 0 or -100."""

    kind: ClassVar[str] = "region_label"
    tensors: ClassVar[dict[str, str]] = {"labels": "int8"}
    question: str
    turn: int
    response: str  # id of the response; "" for labels from known boxes
    attention: str
    text: str  # the response that comes after the question when several turns are trained in one sequence
    prompt: str  # the question as it is to be put in training
    box: Box4  # x0, y0, x1, y1 in cells around the foreground
    usable: bool  # False when the whole map is ignored
    foreground: int  # number of foreground cells
    valid: int  # number of cells that are not ignored
    view: Literal["dynamic", "square"]
    size_px: tuple[int, int]  # (width, height) of the picture without padding
    agrees: bool | None = None  # whether a foreground cell lies on a known answer box; None where none is known


@dataclass(frozen=True, slots=True)
class ResolutionSweep(Record):
    """One turn answered at rising resolutions."""

    kind: ClassVar[str] = "ladder"
    question: str
    turn: int
    tokens: tuple[int, ...]  # visual tokens allowed at each level, rising
    answers: tuple[str, ...]  # one per level
    annotation: str  # the data set's answer

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.answers):
            raise DataError(
                f"Answers by resolution need one answer per level, but there are {len(self.answers)} answers for "
                f"{len(self.tokens)} resolutions."
            )
        if list(self.tokens) != sorted(set(self.tokens)):
            raise DataError(f"The resolutions of answers must rise: {list(self.tokens)}.")


@dataclass(frozen=True, slots=True)
class ZoomComparison(Record):
    """One turn answered from the coarse pass alone and with the region."""

    kind: ClassVar[str] = "zoom_comparison"
    question: str
    turn: int
    tokens: int  # visual tokens allowed in the coarse pass
    coarse: str  # the answer of the coarse pass
    zoomed: str  # the answer with the region
    answers: tuple[str, ...]  # right answers, any of which counts


@dataclass(frozen=True, slots=True)
class Verdict(Record):
    """The coarse answer against the zoomed one."""

    kind: ClassVar[str] = "verdict"
    question: str
    turn: int
    coarse: str  # the answer of the coarse pass
    zoomed: str  # the answer with the region read
    coarse_right: bool | None  # whether the first is right; None when nobody could say
    zoomed_right: bool | None
    by: Literal["rule", "judge", "nobody"]  # what decided: "rule", "judge", or "nobody"
    boxes: tuple[Box4, ...] = ()  # regions that were read, xyxy in original pixels
    note: str = ""  # why nobody could


@dataclass(frozen=True, slots=True)
class Skip(Record):
    """A question that could not be used."""

    kind: ClassVar[str] = "skip"
    question: str
    reason: str


KINDS: dict[str, type[Record]] = {
    cls.kind: cls
    for cls in (Question, Response, Attention, RegionLabel, ResolutionSweep, ZoomComparison, Verdict, Skip)
}


def content_id(record: Record, digests: Mapping[str, str] | None = None) -> str:
    """Twenty hex digits of a hash over kind, schema, values and the digests of the tensors."""
    content = {"kind": record.kind, "schema": SCHEMA, "values": record.values(), "tensors": dict(digests or {})}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def tensor_digest(array: np.ndarray) -> str:
    """Twenty hex digits of a hash over type, shape and values."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:20]


def record_from_values(kind: str, values: Any, where: str) -> Record:
    """The record of a kind from JSON values (DataError: an unknown kind, a missing or unknown field, or a value of the
    wrong type; it says which and where)."""
    if kind not in KINDS:
        raise DataError(f"{where}: unknown kind of record {kind!r}; known: {', '.join(KINDS)}.")
    return typing.cast(Record, from_values(KINDS[kind], values, where))


def from_values(cls: type, values: Any, where: str) -> Any:
    """A dataclass from JSON values, every field checked against its annotation (DataError: as in
    `record_from_values`)."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, not {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise DataError(f"{where}: unknown field {name!r}; known: {', '.join(fields)}.")
    out = {}
    for name, entry in fields.items():
        if name in values:
            out[name] = _cast(hints[name], values[name], f"{where}: {name}")
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise DataError(f"{where}: {name!r} is missing.")
    return cls(**out)


def _cast(hint: Any, value: Any, where: str) -> Any:
    """The value as its annotation says; JSON lists become tuples."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _cast(next(kind for kind in inner if kind is not type(None)), value, where)
    if origin is Literal:
        if value not in inner:
            raise DataError(f"{where} must be one of {', '.join(map(str, inner))}, not {value!r:.60}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise DataError(f"{where} must be a list, not {value!r:.60}.")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_cast(inner[0], item, where) for item in value)
        if len(value) != len(inner):
            raise DataError(f"{where} must hold {len(inner)} values, not {len(value)}.")
        return tuple(_cast(kind, item, where) for kind, item in zip(inner, value, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise DataError(f"{where} must be an object, not {value!r:.60}.")
        return value
    if dataclasses.is_dataclass(hint):
        return from_values(typing.cast(type, hint), value, where)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise DataError(f"{where} must be of type {hint.__name__}, not {value!r:.60}.")
    return value
