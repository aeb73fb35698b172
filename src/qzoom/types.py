"""The records that cross borders: what was asked, what was seen, what was answered.

All frozen. Boxes are xyxy in original pixels (after EXIF rotation), half-open: x in [x0, x1), y in [y0, y1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from qzoom.errors import QZoomError
from qzoom.settings import Between, Text, settings

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image


Box: TypeAlias = tuple[int, int, int, int]
ZoomMode: TypeAlias = Literal["auto", "never", "always"]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether the coarse view was judged enough.

    Args:
        score: the gate's probability that the coarse view is NOT enough, or the score of what decides in its place
            (`ZoomConfig.decide_by`); None when nothing was asked.
        threshold: the score at which it zooms; None when nothing was asked.
        zoomed: whether a region was read.
        note: why not, when zooming was wanted and did not happen (e.g. an empty map); else empty.
    """

    score: float | None
    threshold: float | None
    zoomed: bool
    note: str = ""

    def figures(self) -> tuple[str, str]:
        """Score and threshold of a gate that was asked, with as many digits as it takes to tell them apart, at least
        three."""
        pairs = [(f"{self.score:.{digits}f}", f"{self.threshold:.{digits}f}") for digits in range(3, 17)]
        return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `note` only when there is one."""
        out: dict[str, Any] = {"score": self.score, "threshold": self.threshold, "zoomed": self.zoomed}
        if self.note:
            out["note"] = self.note
        return out


@dataclass(frozen=True, slots=True)
class Region:
    """One region that was (or would be) read.

    Args:
        box: xyxy in original pixels of its picture, half-open.
        score: the highest blurred map value inside it, in [0, 1].
        image: index of the picture, in the order of the conversation.
        crop_size_px: (width, height) of the crop after resizing, as the vision encoder sees it; None if not read.
        tokens: visual tokens that the crop takes; 0 if not read.
        page: for a page of a PDF, its number in the file, from 1; else None.
        box_pt: the box in points (1/72 inch) from the top left corner of that page as drawn.
        reread: whether it is the smaller crop of a second reading (`ZoomConfig.reread`).
    """

    box: Box
    score: float
    image: int = 0
    crop_size_px: tuple[int, int] | None = None
    tokens: int = 0
    page: int | None = None
    box_pt: tuple[float, ...] | None = None
    reread: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `page` and `box_pt` only for a page of a PDF, `reread` only where it is true."""
        again = {"reread": True} if self.reread else {}
        place = {"page": self.page, "box_pt": list(self.box_pt)} if self.page and self.box_pt else {}
        return {
            "box": list(self.box),
            "score": self.score,
            "image": self.image,
            "crop_size_px": list(self.crop_size_px) if self.crop_size_px else None,
            "tokens": self.tokens,
            **place,
            **again,
        }


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """The region branch's map over one picture's coarse cells.

    Args:
        values: float32 array of shape (rows, columns), probabilities after sink removal and blur.
        image: index of the picture.
    """

    values: np.ndarray
    image: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens paid for one answer.

    Args:
        coarse_tokens: visual tokens of the coarse view, all pictures.
        region_tokens: visual tokens of all regions.
        prompt_tokens: the prompt's length in tokens, coarse and region tokens included (both crops', where it was read
            again).
        completion_tokens: generated tokens, the end token included; of an answer that was read again, those of the
            reading that counts.
        reused_tokens: prompt tokens whose prefill had been paid by an earlier question of the same session or batch.
    """

    coarse_tokens: int = 0
    region_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain JSON types."""
        return {name: getattr(self, name) for name in self.__slots__}


@settings(prefix=False)
class SamplingParams:
    """How the answer is decoded.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    max_new_tokens: Annotated[int, Between(1, 10**6)] = 128
    """Maximum number of tokens of the answer."""
    temperature: Annotated[float, Between(0, 100)] = 0.0
    """Sampling temperature; 0 (or below 0.00001) decodes greedily."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: sample from the likeliest tokens with this total probability."""
    top_k: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Sample from the k likeliest tokens; 0 for all."""
    stop: tuple[Text, ...] = ()
    """Texts that end the answer and are not part of it."""
    seed: Annotated[int, Between(-(2**63), 2**64 - 1)] | None = None
    """Seed of the sampling; None draws a new one."""
    ignore_eos: bool = False
    """Continue after the end token, so that every answer has `max_new_tokens` tokens (for load tests)."""
    presence_penalty: Annotated[float, Between(-2, 2)] = 0.0
    """Subtracted from the logit of every token that the answer already has."""
    frequency_penalty: Annotated[float, Between(-2, 2)] = 0.0
    """Subtracted from the logit of a token for each time that the answer already has it."""
    json_schema: str = ""
    """A JSON schema, as JSON, that the answer must follow; empty for free text."""
    logprobs: Annotated[int, Between(0, 20)] | None = None
    """Keep each token's log probability and those of so many of the likeliest tokens; None keeps none."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's natural log probability under the model's own logits, before temperature, penalties, grammar.

    Args:
        token: its id.
        logprob: its log probability.
        top: ids and log probabilities of the likeliest tokens, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Perception:
    """The gate's and the region branch's view of a question, without an answer.

    Args:
        gate: score and what it decides (`zoomed` says whether an answer would zoom).
        regions: what it would read, best first, whatever the gate says; empty for an empty map.
        heat_maps: one per picture.
        image_sizes_px: (width, height) of every picture, after EXIF rotation.
        usage: tokens paid.
        timing_ms: milliseconds per step.
    """

    gate: GateDecision
    regions: tuple[Region, ...]
    heat_maps: tuple[HeatMap, ...] = field(compare=False)
    image_sizes_px: tuple[tuple[int, int], ...]
    usage: Usage
    timing_ms: dict[str, float] = field(compare=False)

    def to_dict(self, *, heat_map: bool = False) -> dict[str, Any]:
        """Plain JSON types."""
        return _record(self, heat_map=heat_map)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question. Answers are equal if everything but times, heat maps and pictures is equal.

    Args:
        text: the answer.
        tokens: its token ids, the end token included.
        gate: what the gate said.
        regions: what was read at high resolution; empty when the coarse view was enough.
        heat_maps: the region branch's map, one per picture; empty when it did not run.
        usage: tokens paid.
        timing_ms: milliseconds per step, then "total" since the call began. Both are the whole batch's, whatever this
            answer's share in it, and "total" also counts the time that the consumer of a stream took between events.
        image_sizes_px: (width, height) of every picture, after EXIF rotation.
        notes: things worth knowing, e.g. "first of 3 pages".
        finish_reason: "stop" (end token or stop text), "length" or "cancelled".
        question: the question's text.
        cell_px: side of the square of resized pixels that one visual token covers; 0 if unknown.
        images: the pictures (RGB), for drawing; not part of `to_dict`.
        logprobs: one per token, the end token left out; empty unless `SamplingParams.logprobs` asks for them.
    """

    text: str
    tokens: tuple[int, ...]
    gate: GateDecision
    regions: tuple[Region, ...]
    heat_maps: tuple[HeatMap, ...] = field(compare=False)
    usage: Usage
    timing_ms: dict[str, float] = field(compare=False)
    image_sizes_px: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()
    finish_reason: Literal["stop", "length", "cancelled"] = "stop"
    question: str = ""
    cell_px: int = 0
    images: tuple[PIL.Image.Image, ...] = field(default=(), repr=False, compare=False)
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self, *, heat_map: bool = False) -> dict[str, Any]:
        """Plain JSON types; the pictures are left out."""
        return _record(self, heat_map=heat_map)

    def plot(self, image: int = 0) -> PIL.Image.Image:
        """A picture of the answer: the page with heat map and boxes, the crops, gate, tokens and text."""
        from qzoom.plots.answer import plot_answer

        return plot_answer(self, image=image)

    def save(self, path: str | Path) -> Path:
        """Draw the answer and write it; the file ending chooses the format.

        Returns:
            The path written.
        """
        from qzoom.plots.answer import save_plot

        return save_plot(self, Path(path))

    def _repr_html_(self) -> str:
        from qzoom.plots.answer import answer_html

        return answer_html(self)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One step of a streamed answer.

    Args:
        kind: "perception" (gate and regions are known), "text" (a piece of the answer), or "answer" (the end). In
            batches an answer that fails ends with "error"; `QZoom.stream` raises it instead.
        text: the new piece, for "text".
        perception: for "perception".
        answer: for "answer".
        error: for "error".
        logprobs: with "text", of the tokens since the last "text", if they are asked for.
    """

    kind: Literal["perception", "text", "answer", "error"]
    text: str = ""
    perception: Perception | None = None
    answer: Answer | None = None
    error: QZoomError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


def _record(value: Any, *, heat_map: bool) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if isinstance(value, Answer):
        out["text"] = value.text
    out["gate"] = value.gate.to_dict()
    out["regions"] = [region.to_dict() for region in value.regions]
    out["usage"] = value.usage.to_dict()
    out["timing_ms"] = {name: round(ms, 2) for name, ms in value.timing_ms.items()}
    out["image_sizes_px"] = [list(size) for size in value.image_sizes_px]
    if isinstance(value, Answer):
        out |= {"finish_reason": value.finish_reason, "notes": list(value.notes), "tokens": list(value.tokens)}
    if heat_map:
        out["heat_maps"] = [{"image": m.image, "values": m.values.tolist()} for m in value.heat_maps]
    return out
