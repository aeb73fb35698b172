"""What the server sends back: OpenAI's records, with gate, regions and times beside them under `qzoom`."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel

from qzoom import __version__
from qzoom.types import Answer, GateDecision, HeatMap, Perception, Region, Usage

__all__ = [
    "ChatCompletion",
    "ErrorReply",
    "Header",
    "ModelCard",
    "ModelList",
    "PerceptionReply",
    "StatusReply",
    "VersionReply",
    "completion",
    "perception_reply",
    "zoom_record",
]

FINGERPRINT = f"qzoom-{__version__}"


class GateRecord(BaseModel):
    """See `GateDecision`; `note` only when there is one."""

    score: float | None
    threshold: float | None
    zoomed: bool
    note: str | None = None


class RegionRecord(BaseModel):
    """A box in original pixels (x0, y0, x1, y1), half-open, and the picture it is in."""

    box: list[int]
    image: int
    score: float


class ZoomRecord(BaseModel):
    """Where the model looked; `heatmap` has one list of rows per picture, or is null when not asked for."""

    gate: GateRecord
    regions: list[RegionRecord]
    image_sizes: list[list[int]]
    timing_ms: dict[str, float]
    heatmap: list[list[list[float]]] | None
    notes: list[str] | None = None


class PromptDetails(BaseModel):
    """Parts of the prompt; image tokens are coarse and region tokens together."""

    cached_tokens: int
    image_tokens: int
    coarse_tokens: int
    region_tokens: int


class UsageRecord(BaseModel):
    """Tokens paid."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ReplyMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    qzoom: ZoomRecord


class Choice(BaseModel):
    """The one choice."""

    index: int
    message: ReplyMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageRecord


class PerceptionReply(ZoomRecord):
    """Gate, regions and map, without an answer."""

    id: str
    object: Literal["qzoom.perception"]
    created: int
    model: str
    usage: UsageRecord


class ErrorDetail(BaseModel):
    """What is wrong, of what kind, with which field, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every refusal."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """The model served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    qzoom: dict[str, Any]


class ModelList(BaseModel):
    """The models served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class StatusReply(BaseModel):
    """Alive, or ready."""

    status: str


class VersionReply(BaseModel):
    """The version of qzoom."""

    version: str


class Header:
    """What all records of one request share.

    Args:
        model: the name that the client used.
        prefix: of the id.
    """

    def __init__(self, model: str, prefix: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model

    def fields(self, kind: str) -> dict[str, Any]:
        """id, object, created and model."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def completion(header: Header, answer: Answer, *, heatmap: bool) -> dict[str, Any]:
    """A whole answer as JSON types."""
    message = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
        "qzoom": zoom_record(answer, heatmap=heatmap),
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    return header.fields("chat.completion") | {
        "system_fingerprint": FINGERPRINT,
        "choices": [choice],
        "usage": usage_record(answer.usage),
    }


def perception_reply(header: Header, seen: Perception, *, heatmap: bool) -> dict[str, Any]:
    """Gate, regions and map as JSON types."""
    return (
        header.fields("qzoom.perception")
        | zoom_record(seen, heatmap=heatmap, proposed=True)
        | {"usage": usage_record(seen.usage)}
    )


def zoom_record(seen: Answer | Perception, *, heatmap: bool, proposed: bool = False) -> dict[str, Any]:
    """Gate, regions, sizes, times and, where asked for, the map.

    Args:
        seen: what to tell.
        heatmap: whether the map was asked for.
        proposed: tell the regions although the gate was content.
    """
    shown: tuple[Region, ...] = seen.regions if seen.gate.zoomed or proposed else ()
    out: dict[str, Any] = {
        "gate": _gate(seen.gate),
        "regions": [{"box": list(r.box), "image": r.image, "score": r.score} for r in shown],
        "image_sizes": [list(size) for size in seen.image_sizes_px],
        "timing_ms": {name: round(ms, 2) for name, ms in seen.timing_ms.items()},
        "heatmap": [_rows(m) for m in seen.heat_maps] if heatmap else None,
    }
    if isinstance(seen, Answer) and seen.notes:
        out["notes"] = list(seen.notes)
    return out


def usage_record(usage: Usage) -> dict[str, Any]:
    """Tokens in OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.reused_tokens,
            "image_tokens": usage.coarse_tokens + usage.region_tokens,
            "coarse_tokens": usage.coarse_tokens,
            "region_tokens": usage.region_tokens,
        },
    }


def _gate(gate: GateDecision) -> dict[str, Any]:
    return gate.to_dict()


def _rows(heat_map: HeatMap) -> list[list[float]]:
    """Rows of the map, top to bottom, in millionths."""
    return [[round(value, 6) for value in row] for row in heat_map.values.tolist()]
