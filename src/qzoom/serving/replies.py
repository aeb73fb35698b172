"""What the server sends back: OpenAI's records, with gate, regions and times under `qzoom`.

The records are typed dictionaries: the same declaration checks the code that fills them and gives the OpenAPI document.
"""

from __future__ import annotations

import base64
import io
import math
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, NotRequired, cast

from PIL import Image
from typing_extensions import TypedDict

from qzoom import __version__
from qzoom.images.load import LoadedImage, png_data_url
from qzoom.types import Answer, Perception, Region, TokenLogprob, Usage

FINGERPRINT = f"qzoom-{__version__}"
_JPEG_SIDE_PX = 65_500


class GateRecord(TypedDict):
    """See `GateDecision`; `note` only when there is one."""

    score: float | None
    threshold: float | None
    zoomed: bool
    note: NotRequired[str]


class RegionRecord(TypedDict):
    """A box in original pixels (x0, y0, x1, y1), half-open, and the number of its picture; for a page of a PDF also its
    number, from 1, and the box in points from its top left corner. `reread`: the smaller crop of a second reading."""

    box: list[int]
    image: int
    score: float | None
    page: NotRequired[int]
    box_pt: NotRequired[list[float]]
    reread: NotRequired[bool]


class ZoomRecord(TypedDict):
    """Gate, regions and region maps; `heatmap` has one list of rows per picture, or is null when not requested."""

    gate: GateRecord
    regions: list[RegionRecord]
    image_sizes: list[list[int]]
    timing_ms: dict[str, float]
    heatmap: list[list[list[float | None]]] | None
    notes: NotRequired[list[str]]


class UsageRecord(TypedDict):
    """Tokens in OpenAI's names; the details are cached, image, coarse and region tokens (image: coarse and region)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ReplyMessage(TypedDict):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None
    qzoom: ZoomRecord


class Choice(TypedDict):
    """One of the answers."""

    index: int
    message: ReplyMessage
    logprobs: LogprobRecord | None
    finish_reason: Literal["stop", "length"]


class Header(TypedDict):
    """What all records of one request share."""

    id: str
    created: int
    model: str


class ChatCompletion(Header):
    """A whole answer."""

    object: Literal["chat.completion"]
    system_fingerprint: str
    choices: list[Choice]
    usage: UsageRecord


class PerceptionReply(ZoomRecord, Header):
    """Gate, regions and map, without an answer."""

    object: Literal["qzoom.perception"]
    usage: UsageRecord


class PageRecord(TypedDict):
    """A page of a PDF as a JPEG in a data URL (a PNG where a side has more than 65,500 pixels), its number from 1, and
    its (width, height) in pixels."""

    page: int
    size: list[int]
    url: str


class PagesReply(Header):
    """Pages of a PDF as they are read."""

    object: Literal["qzoom.pages"]
    pages: list[PageRecord]
    notes: list[str]


class ErrorDetail(TypedDict):
    """What is wrong, of what kind, with which field, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


ErrorReply = dict[Literal["error"], ErrorDetail]
"""Every refusal."""


class ModelCard(TypedDict):
    """The model served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    qzoom: dict[str, Any]


class ModelList(TypedDict):
    """The models served: one."""

    object: Literal["list"]
    data: list[ModelCard]


def header(prefix: str, model: str) -> Header:
    """The header of one request's records."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def completion(model: str, answers: Sequence[Answer], tokenizer: Any, *, heatmap: bool) -> ChatCompletion:
    """Whole answers to one request as JSON types."""
    return {
        **header("chatcmpl", model),
        "object": "chat.completion",
        "system_fingerprint": FINGERPRINT,
        "choices": [_choice(index, answer, tokenizer, heatmap=heatmap) for index, answer in enumerate(answers)],
        "usage": usage_record([answer.usage for answer in answers]),
    }


def _choice(index: int, answer: Answer, tokenizer: Any, *, heatmap: bool) -> Choice:
    message: ReplyMessage = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
        "qzoom": zoom_record(answer, heatmap=heatmap),
    }
    return {
        "index": index,
        "message": message,
        "logprobs": logprob_record(tokenizer, answer.logprobs) if answer.logprobs else None,
        "finish_reason": cast(Literal["stop", "length"], answer.finish_reason),  # a cancelled one has no reader
    }


def perception_reply(model: str, perception: Perception, *, heatmap: bool) -> PerceptionReply:
    """Gate, regions (whatever the gate decided) and map as JSON types."""
    return {
        **header("perc", model),
        "object": "qzoom.perception",
        **zoom_record(perception, heatmap=heatmap, proposed=True),
        "usage": usage_record([perception.usage]),
    }


def pages_reply(model: str, pictures: Sequence[LoadedImage]) -> PagesReply:
    """Drawn pages as JSON types; a picture that is no page of a PDF counts as page 1."""
    pages: list[PageRecord] = []
    for picture in pictures:
        number = picture.page.number if picture.page else 1
        pages.append({"page": number, "size": list(picture.size_px), "url": _page_url(picture.image)})
    notes = [note for picture in pictures for note in picture.notes]
    return {**header("pages", model), "object": "qzoom.pages", "pages": pages, "notes": notes}


def _page_url(image: Image.Image) -> str:
    """A page as a JPEG in a data URL, or as a PNG where it is too long for a JPEG."""
    if max(image.size) > _JPEG_SIDE_PX:
        return png_data_url(image)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def zoom_record(result: Answer | Perception, *, heatmap: bool, proposed: bool = False) -> ZoomRecord:
    """Gate, regions, sizes, times and, if requested, the map. `proposed`: include the regions although the gate did not
    zoom."""
    regions = result.regions if result.gate.zoomed or proposed else ()
    maps = [[[round(v, 6) for v in row] for row in m.values.tolist()] for m in result.heat_maps] if heatmap else None
    record: ZoomRecord = {
        "gate": cast(GateRecord, result.gate.to_dict()),
        "regions": [_region_record(region) for region in regions],
        "image_sizes": [list(size) for size in result.image_sizes_px],
        "timing_ms": {name: round(ms, 2) for name, ms in result.timing_ms.items()},
        "heatmap": maps,
    }
    notes = list(result.notes) if isinstance(result, Answer) else []
    strict = cast(ZoomRecord, _finite(record))
    if strict != record:
        notes.append("A number of gate, regions or map is not finite and is given as null; the checkpoint is damaged.")
    if notes:
        strict["notes"] = notes
    return strict


def _region_record(region: Region) -> RegionRecord:
    record: RegionRecord = {"box": list(region.box), "image": region.image, "score": region.score}
    if region.page is not None and region.box_pt is not None:
        record |= {"page": region.page, "box_pt": list(region.box_pt)}
    return record | {"reread": True} if region.reread else record


def _finite(value: Any) -> Any:
    """The same JSON with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def usage_record(usages: Sequence[Usage]) -> UsageRecord:
    """Tokens in OpenAI's names: the prompt of one answer, and the tokens of all answers."""
    usage, new = usages[0], sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": usage.prompt_tokens + new,
        "prompt_tokens_details": {
            "cached_tokens": usage.reused_tokens,
            "image_tokens": usage.coarse_tokens + usage.region_tokens,
            "coarse_tokens": usage.coarse_tokens,
            "region_tokens": usage.region_tokens,
        },
    }


class TopToken(TypedDict):
    """A token and its natural log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TopToken):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TopToken]


LogprobRecord = dict[Literal["content", "refusal"], list[ChosenToken] | None]
"""One entry per token of the answer under "content"; "refusal" is null."""


def logprob_record(tokenizer: Any, logprobs: Iterable[TokenLogprob]) -> LogprobRecord:
    """The record of an answer or of a piece of it."""
    content: list[ChosenToken] = [
        {
            **_token(tokenizer, item.token, item.logprob),
            "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(tokenizer: Any, token: int, logprob: float) -> TopToken:
    data = token_bytes(tokenizer, token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}  # minus infinity is no JSON


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token adds to the text; tokenizers write bytes as letters of their own, or as <0x0A>."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:  # beyond the vocabulary: padding of the model's matrix
        return b""
    if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
        return str(name).encode()
    if hexadecimal := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes([int(hexadecimal[1], 16)])
    letters = _byte_letters()
    if "\u2581" not in name and all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.replace("\u2581", " ").encode()


@cache
def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers' letter for each byte, reversed."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: value for value, letter in bytes_to_unicode().items()}
