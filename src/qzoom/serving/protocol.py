"""Request bodies: OpenAI's chat completions, and `/v1/perceive`, which asks the gate and the region branch only.

`read_payload` checks sizes and counts before anything is decoded, `validate` the types and values.

Fields that clients commonly send and that change nothing here are accepted; the same fields are refused with a sentence
when they ask for something that this server does not do (`qzoom.serving.fields`). Other fields are unknown: the
refusal says where they belong, or names the closest known one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag
from pydantic_core import from_json

from qzoom.serving.errors import ApiError, body_too_large, mib, pictures_too_large
from qzoom.serving.fields import (
    SENTENCES,
    TURN_TOOLS,
    Detail,
    FileExtras,
    ImagePartExtras,
    KnownOfAnswer,
    KnownOfRequest,
    KnownOfTurn,
    ObjectFormat,
    PartExtras,
    PictureExtras,
    Positive,
    SchemaFormat,
    Share,
    Stop,
    Strict,
    TextFormat,
    Unused,
    Whole,
    by_key,
    choice,
    text_or_list,
)
from qzoom.serving.settings import ServerLimits

Model = TypeVar("Model", bound=BaseModel)

_WORDS = {
    "too_short": "it needs at least {min_length}.",
    "too_long": "it may have at most {max_length}.",
    "string_too_short": "the text must not be empty.",
    "string_too_long": "the text may have at most {max_length} characters.",
    "model_type": "it must be an object.",
    "dict_type": "it must be an object.",
    "int_type": "it must be a whole number.",
    "int_from_float": "it must be a whole number.",
    "missing": "it is missing.",
    "none_required": "it must be null.",
}


def _address(value: Any) -> Any:
    """A picture's address alone is short for an object with it."""
    return {"url": value} if isinstance(value, str) else value


def _data_url(value: Any) -> Any:
    """Base64 alone is short for a data URL of a PDF."""
    return (
        value if not isinstance(value, str) or value[:5].lower() == "data:" else f"data:application/pdf;base64,{value}"
    )


class TextPart(PartExtras):
    """A piece of a turn's text."""

    type: Literal["text"]
    text: str


class RefusalPart(PartExtras):
    """An assistant's refusal in an earlier turn: a text."""

    type: Literal["refusal"]
    refusal: str


class ThinkingPart(BaseModel):
    """What an assistant thought aloud in an earlier turn; it is ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["thinking", "redacted_thinking", "reasoning"]


class ImageUrl(PictureExtras):
    """Where a picture is.

    Args:
        url: a `data:image/...;base64,` URL, or http(s) where the server allows its host.
        detail: "low" never zooms, "auto" asks the gate, "high" always zooms, "original" zooms with the largest region
            budget; the most demanding of a request's pictures counts.
    """

    url: str
    detail: Detail | None = None


class ImageUrlPart(ImagePartExtras):
    """A picture in a user's turn; its address alone is enough."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_address, json_schema_input_type=ImageUrl | str)]


class FileData(FileExtras):
    """A file: a PDF, whose pages are pictures, or one picture.

    Args:
        file_data: a `data:application/pdf;base64,` URL, or the base64 alone.
    """

    file_data: Annotated[str, BeforeValidator(_data_url, json_schema_input_type=str)]


class FilePart(PartExtras):
    """A PDF in a user's turn; `qzoom.pages` chooses its pages."""

    type: Literal["file"]
    file: FileData


_CONTENT = choice(text_or_list, "a text or a list of parts")
Part = Annotated[
    Annotated[TextPart, Tag("<text part>")]
    | Annotated[ImageUrlPart, Tag("<image part>")]
    | Annotated[FilePart, Tag("<file part>")],
    by_key(
        "type",
        {"text": "<text part>", "image_url": "<image part>", "file": "<file part>"},
        'a part of type text, image_url or file: {"type": "text", "text": "..."}, {"type": "image_url", "image_url": '
        '{"url": "..."}} or {"type": "file", "file": {"file_data": "..."}} (audio and video are not read)',
    ),
]
AnswerPart = Annotated[
    Annotated[TextPart, Tag("<text part>")]
    | Annotated[RefusalPart, Tag("<refusal part>")]
    | Annotated[ThinkingPart, Tag("<thinking part>")],
    by_key(
        "type",
        {"text": "<text part>", "refusal": "<refusal part>"}
        | dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), "<thinking part>"),
        'a part of type text: {"type": "text", "text": "..."} (pictures stand in turns of the user)',
    ),
]
TextContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], _CONTENT]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")], _CONTENT]
AnswerContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[AnswerPart], Tag("<list>")], _CONTENT]


class SystemMessage(KnownOfTurn):
    """Instructions that come before the conversation."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(KnownOfTurn):
    """A user's turn: text and pictures."""

    role: Literal["user"]
    content: Content


class AssistantMessage(KnownOfAnswer):
    """An earlier answer; the fields that servers and clients add to answers may come back with it.

    Args:
        content: what it said; without it, `refusal` is.
        refusal: why it did not answer.
    """

    role: Literal["assistant"]
    content: AnswerContent | None = None
    refusal: str | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    by_key(
        "role",
        {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>"},
        "a message with role system, developer, user or assistant (there are no tools here)",
    ),
]


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<object>")]
    | Annotated[SchemaFormat, Tag("<schema>")],
    by_key(
        "type",
        {"text": "<text>", "json_object": "<object>", "json_schema": "<schema>"},
        '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}',
    ),
]


class StreamOptions(Strict):
    """What a stream carries besides the answer.

    Args:
        include_usage: end with a chunk that has the tokens and no choices.
        include_obfuscation: taken and ignored.
    """

    include_usage: bool | None = None
    include_obfuscation: Unused = None
    continuous_usage_stats: Literal[False] | None = None


class ZoomControls(Strict):
    """Options of zooming; `extra_body={"qzoom": {...}}` in OpenAI's clients.

    Args:
        zoom: overrides every picture's `detail`.
        gate_threshold: zoom at this gate score.
        region_threshold: map value above which a cell is of interest.
        max_visual_tokens: most visual tokens of the coarse pass and all regions together.
        heatmap: put the region branch's map into the result.
        pages: pages of PDFs to read, such as "1-5,9"; all unless given.
    """

    zoom: Literal["auto", "never", "always"] | None = None
    gate_threshold: Share | None = None
    region_threshold: Share | None = None
    max_visual_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), Whole] | None = None
    heatmap: bool | None = None
    pages: Annotated[str, Field(max_length=200)] | None = None


class ModelRequest(Strict):
    """What every body names."""

    model: str


class PerceiveRequest(ModelRequest):
    """A question to the gate and the region branch only."""

    messages: Annotated[list[Message], Field(min_length=1)]
    qzoom: ZoomControls | None = None
    user: Unused = None
    metadata: Unused = None


class PagesRequest(ModelRequest):
    """A PDF whose pages are wanted as pictures."""

    file: FileData
    qzoom: ZoomControls | None = None


class ChatRequest(PerceiveRequest, KnownOfRequest):
    """One chat completion. `temperature` is 0 and `max_tokens` 128 unless given, as in `QZoom.ask`.

    Of several answers (`n`), the first has the seed that was given, the next one that seed plus 1, and so on.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), Whole] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), Whole] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=8), Whole] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    response_format: ResponseFormat | None = None


def read_payload(body: bytes, limits: ServerLimits) -> dict[str, Any]:
    """Parse a request body and check all that can be counted without decoding or fetching a picture.

    Returns:
        The JSON object: bounded depth, no NaN, no halves of surrogate pairs. Types of fields are not checked.

    Raises:
        ApiError: status 400 for what is not such an object and for counts, 413 for too many bytes.
    """
    if len(body) > limits.body_bytes:
        raise body_too_large(limits.body_bytes)
    # Counted before parsing: a body of brackets would unpack to far more memory than it has bytes.
    if sum(body.count(mark) for mark in (b"{", b"[", b",", b":")) > limits.json_values:
        text = f"The body has more JSON values than the limit of about {limits.json_values}; send fewer."
        raise ApiError(400, text, code="too_many_values")
    if not body.strip():
        raise ApiError(400, "The body is empty; send a JSON object.", code="invalid_json")
    try:
        encoding = json.detect_encoding(body)  # a byte order mark, UTF-16 and UTF-32 are read too
        body = body if encoding == "utf-8" else body.decode(encoding).encode("utf-8")
        payload = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        text = f"The body is not valid JSON: {str(error)[:200]}."
        raise ApiError(400, text, code="invalid_json") from error
    if not isinstance(payload, dict):
        raise ApiError(400, "The body is not a JSON object; send {...}.", code="invalid_json")
    if isinstance(payload.get("messages"), list):
        _check_messages(payload["messages"], limits)
    return payload


def _check_messages(messages: list[Any], limits: ServerLimits) -> None:
    """Refuse messages beyond the counts and sizes; other shapes than messages with parts are left to `validate`."""
    _check_count(len(messages), limits.messages, "messages", "too_many_messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    parts = [p for content in contents if isinstance(content, list) for p in content if isinstance(p, dict)]
    count = sum(len(content) for content in contents if isinstance(content, list))
    _check_count(count, limits.parts, "content parts", "too_many_parts")
    refusals = [m.get("refusal") for m in messages if isinstance(m, dict)]
    pieces = [part.get(name) for part in parts for name in ("text", "refusal")]
    texts = [text for text in [*contents, *refusals, *pieces] if isinstance(text, str)]
    _check_count(sum(map(len, texts)), limits.text_chars, "characters of text", "text_too_long")
    urls = [_url(part) for part in parts if part.get("type") in _PICTURES or any(name in part for name in _PICTURES)]
    _check_count(len(urls), limits.pictures, "pictures", "too_many_images")
    sizes = [_base64_bytes(url) for url in urls]
    for number, size in enumerate(sizes, start=1):
        if size > limits.picture_bytes:
            text = f"Picture {number} is larger than the limit of {mib(limits.picture_bytes)}; compress or shrink it."
            raise ApiError(413, text, param="messages", code="image_too_large")
    if sum(sizes) > limits.total_picture_bytes:
        raise pictures_too_large(limits.total_picture_bytes)


def _check_count(count: int, most: int, what: str, code: str) -> None:
    if count > most:
        text = f"The request has {count} {what}, above the limit of {most}; send less."
        raise ApiError(400, text, param="messages", code=code)


_PICTURES = ("image_url", "file")


def _url(part: dict[str, Any]) -> str:
    """The address in an image or file part; "" for one of another shape."""
    value = part.get("image_url") or part.get("file")
    url = value.get("url", _data_url(value.get("file_data"))) if isinstance(value, dict) else value
    return url.strip() if isinstance(url, str) else ""


def _base64_bytes(url: str) -> int:
    """Least bytes that a data URL decodes to, from its length; 0 for other addresses."""
    if url[:5].lower() != "data:":
        return 0
    return max(0, (len(url) - url.find(",") - 1) // 4 * 3 - 2)


def validate(model: type[Model], payload: dict[str, Any]) -> Model:
    """Check the types and values of a parsed body.

    Raises:
        ApiError: status 400; its sentence and `param` name the first field that is wrong.
    """
    try:
        return model.model_validate(payload)
    except pydantic.ValidationError as error:
        raise _explain(model, error.errors(include_url=False)[0]) from error


def _explain(model: type[BaseModel], failure: Mapping[str, Any]) -> ApiError:
    kind, location = failure["type"], failure["loc"]
    *above, last = location or ("",)
    path = [step for step in above if not _is_tag(step)]
    if kind == "extra_forbidden" or not _is_tag(last):
        path.append(last)
    where = _dotted(path)
    if kind == "extra_forbidden":
        text = f"Unknown field {ascii(str(last))[:80]}; {_hint(model, path[:-1], str(last))}"
        return ApiError(400, text, param=where, code="unknown_field")
    name = next((str(step) for step in path if SENTENCES.get(str(step))), None)
    if name is not None and kind != "no_such_kind":
        sentence = TURN_TOOLS if path[0] == "messages" and name == "function_call" else SENTENCES[name]
        return ApiError(400, f"{where}: {sentence}", param=where, code="unsupported")
    text = _WORDS[kind].format(**failure.get("ctx", {})) if kind in _WORDS else _sentence(str(failure["msg"]))
    if kind == "literal_error" and path[0] == "messages" and last == "type":
        text = "it must be 'text' (pictures stand in turns of the user)."
    return ApiError(400, f"{where}: {text}", param=where)


def _is_tag(step: int | str) -> bool:
    """Whether a step of a location names an alternative (a `Tag` above) and no field."""
    return isinstance(step, str) and step.startswith("<")


def _dotted(path: Sequence[int | str]) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else "." * bool(out) + ascii(step)[1:-1][:60]
    return out or "the body"


def _hint(model: type[BaseModel], above: Sequence[int | str], name: str) -> str:
    """Where an unknown field of a body belongs, or which known one is close to it."""
    if name == "extra_body":
        return "it is an argument of OpenAI's Python client; write what it holds on top of the request."
    homes: dict[str, Mapping[str, Any]] = {
        "qzoom": ZoomControls.model_fields,
        "image_url": dict.fromkeys(("url", "detail")),
        "file": dict.fromkeys(("file_data",)),
        "stream_options": StreamOptions.model_fields,
        "": model.model_fields,
        "messages": dict.fromkeys(("role", "content")),
        "content": dict.fromkeys(("type", "text", "image_url", "file")),
    }
    here = next((step for step in reversed(above) if isinstance(step, str)), "")
    home = next((home for home, names in homes.items() if name in names), None)
    if home is not None:
        return f"it {_belongs(home)}."
    if name in ChatRequest.model_fields:
        return "only /v1/chat/completions takes it."
    for home in sorted(homes, key=lambda home: home != here):
        close = difflib.get_close_matches(name[:80].lower(), homes[home], n=1)
        if close:
            return f"did you mean {close[0]!r}{'' if home == here else f', which {_belongs(home)}'}?"
    return "leave it out."


def _belongs(home: str) -> str:
    places = {"": "on top of the request", "messages": "into a message", "content": "into a part of 'content'"}
    return f"belongs {places.get(home, f'into {home!r}')}"


def _sentence(text: str) -> str:
    """A validator's message as the end of a sentence of ours."""
    text = text.removeprefix("Input should be ").removeprefix("Input ").rstrip(".")
    return f"it must be {text}." if text else "it is not valid."
