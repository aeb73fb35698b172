"""Request bodies: OpenAI's chat completions, and `/v1/perceive`, which asks the gate and the region branch only.

`read_payload` checks sizes and counts before anything is decoded, `validate` the types and values.

Fields that OpenAI's clients commonly send and that change nothing here are accepted; those that ask for something this
server does not do are refused with a sentence (`UNSUPPORTED`), and unknown ones with the closest known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import from_json

from qzoom.serving.errors import ApiError, body_too_large, mib, pictures_too_large
from qzoom.serving.settings import ServerLimits

__all__ = [
    "ChatRequest",
    "ImageUrlPart",
    "Message",
    "PerceiveRequest",
    "ZoomControls",
    "read_payload",
    "validate",
]

Model = TypeVar("Model", bound=BaseModel)

UNSUPPORTED = {
    "n": "this server gives one answer per request; leave it out or set it to 1.",
    "logprobs": "this server gives no log probabilities; leave it out or set it to false.",
    "top_logprobs": "this server gives no log probabilities; leave it out or set it to 0.",
    "presence_penalty": "this server has no penalties; leave it out or set it to 0.",
    "frequency_penalty": "this server has no penalties; leave it out or set it to 0.",
    "logit_bias": "this server does not change the odds of tokens; leave it out.",
    "response_format": "answers are plain text; leave it out or set it to {'type': 'text'}.",
    "modalities": "answers are text only; leave it out or set it to ['text'].",
    "tools": "the model calls no tools; leave them out.",
    "tool_choice": "the model calls no tools; leave it out.",
    "tool_calls": "the model calls no tools; leave them out.",
    "functions": "the model calls no functions; leave them out.",
    "function_call": "the model calls no functions; leave it out.",
    "audio": "the model neither hears nor speaks; leave it out.",
    "prediction": "this server takes no predicted answers; leave it out.",
    "web_search_options": "this server searches nothing; leave it out.",
}
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


def _whole(value: Any) -> Any:
    """5.0 is the same JSON number as 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _choice(choose: Callable[[Any], str | None], message: str) -> Discriminator:
    return Discriminator(choose, custom_error_type="no_such_kind", custom_error_message=message)


def _by_key(key: str, tags: dict[str, str], message: str) -> Discriminator:
    """Chooses an alternative by the value under `key`, so that only its errors are reported."""

    def choose(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return tags.get(name) if isinstance(name, str) else None

    return _choice(choose, message)


Detail = Literal["low", "auto", "high", "original"]
Nothing = Annotated[None, Field(description="Taken only when it is null.")]
Unused = Annotated[Any, Field(description="Taken and ignored.")]
Empty = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Whole = BeforeValidator(_whole)
One = Annotated[int, Field(ge=1, le=1), Whole]
Naught = Annotated[int, Field(ge=0, le=0), Whole]
Positive = Annotated[int, Field(ge=1, le=10**6), Whole]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=16), Tag("<list>")],
    _choice(_text_or_list, "a text or a list of texts"),
]


class _Strict(BaseModel):
    """No unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of a turn's text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is.

    Args:
        url: a `data:image/...;base64,` URL, or http(s) where the server allows its host.
        detail: "low" never zooms, "auto" asks the gate, "high" always zooms, "original" zooms with the largest region
            budget; the most demanding of a request's pictures counts.
    """

    url: str
    detail: Detail | None = None


class ImageUrlPart(_Strict):
    """A picture in a user's turn."""

    type: Literal["image_url"]
    image_url: ImageUrl


_CONTENT = _choice(_text_or_list, "a text or a list of parts")
Part = Annotated[
    Annotated[TextPart, Tag("<text part>")] | Annotated[ImageUrlPart, Tag("<image part>")],
    _by_key(
        "type",
        {"text": "<text part>", "image_url": "<image part>"},
        "a part of type text or image_url (audio, video and files are not read)",
    ),
]
TextContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], _CONTENT]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")], _CONTENT]


class SystemMessage(_Strict):
    """Instructions that come before the conversation."""

    role: Literal["system", "developer"]
    content: TextContent
    name: Unused = None


class UserMessage(_Strict):
    """A user's turn: text and pictures."""

    role: Literal["user"]
    content: Content
    name: Unused = None


class AssistantMessage(_Strict):
    """An earlier answer; the fields that this server adds to its answers may come back with it."""

    role: Literal["assistant"]
    content: TextContent
    name: Unused = None
    refusal: Nothing = None
    tool_calls: Empty | None = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: Unused = None
    qzoom: Unused = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")],
    _by_key(
        "role",
        {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>"},
        "a message with role system, developer, user or assistant (there are no tools here)",
    ),
]


class StreamOptions(_Strict):
    """What a stream carries besides the answer.

    Args:
        include_usage: end with a chunk that has the tokens and no choices.
        include_obfuscation: taken and ignored.
    """

    include_usage: bool | None = None
    include_obfuscation: Unused = None


class TextFormat(_Strict):
    """The one format of answers."""

    type: Literal["text"]


class ZoomControls(_Strict):
    """Options of zooming; `extra_body={"qzoom": {...}}` in OpenAI's clients.

    Args:
        zoom: overrides every picture's `detail`.
        gate_threshold: zoom at this gate score.
        region_threshold: map value above which a cell is of interest.
        max_visual_tokens: most visual tokens of the coarse pass and all regions together.
        heatmap: put the region branch's map into the result.
    """

    zoom: Literal["auto", "never", "always"] | None = None
    gate_threshold: Share | None = None
    region_threshold: Share | None = None
    max_visual_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), Whole] | None = None
    heatmap: bool | None = None


class PerceiveRequest(_Strict):
    """A question to the gate and the region branch only."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    qzoom: ZoomControls | None = None
    user: Unused = None
    metadata: Unused = None


class ChatRequest(PerceiveRequest):
    """One chat completion. `temperature` is 0 and `max_tokens` 128 unless given, as in `QZoom.ask`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), Whole] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), Whole] | None = None
    ignore_eos: bool | None = None
    # Taken when they ask for what this server does anyway.
    n: One | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Naught | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    web_search_options: Nothing = None
    # Taken and ignored.
    store: Unused = None
    parallel_tool_calls: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    reasoning_effort: Unused = None
    verbosity: Unused = None


def read_payload(body: bytes, limits: ServerLimits) -> dict[str, Any]:
    """Parse a request body and check all that can be counted without decoding or fetching a picture.

    Args:
        body: the whole body.
        limits: the server's limits.

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
    try:
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
    texts = [text for text in [*contents, *(part.get("text") for part in parts)] if isinstance(text, str)]
    _check_count(sum(map(len, texts)), limits.text_chars, "characters of text", "text_too_long")
    urls = [_url(part) for part in parts if "image_url" in part or part.get("type") == "image_url"]
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


def _url(part: dict[str, Any]) -> str:
    """The address in an image part; "" for one of another shape."""
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    return url if isinstance(url, str) else ""


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
        close = difflib.get_close_matches(str(last)[:80], _field_names(model), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "leave it out."
        text = f"Unknown field {ascii(str(last))[:80]}; {hint}"
        return ApiError(400, text, param=where, code="unknown_field")
    name = next((str(step) for step in path if step in UNSUPPORTED), None)
    if name is not None:
        return ApiError(400, f"{where}: {UNSUPPORTED[name]}", param=where, code="unsupported")
    text = _WORDS[kind].format(**failure.get("ctx", {})) if kind in _WORDS else _sentence(str(failure["msg"]))
    return ApiError(400, f"{where}: {text}", param=where)


def _is_tag(step: int | str) -> bool:
    """Whether a step of a location names an alternative (a `Tag` above) and no field."""
    return isinstance(step, str) and step.startswith("<")


def _dotted(path: Sequence[int | str]) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else "." * bool(out) + ascii(step)[1:-1][:60]
    return out or "the body"


def _field_names(model: type[BaseModel]) -> list[str]:
    """All field names of a model and of the models inside it."""
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def _sentence(text: str) -> str:
    """A validator's message as the end of a sentence of ours."""
    text = text.removeprefix("Input should be ").removeprefix("Input ").rstrip(".")
    return f"it must be {text}." if text else "it is not valid."
