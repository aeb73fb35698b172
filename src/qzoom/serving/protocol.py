"""What clients may send: OpenAI's chat completions, and the same questions to the gate and region branch alone.

Fields that OpenAI's clients commonly send and that change nothing here are taken; those that ask for something this
server does not do are refused with a sentence (`parse.NOT_DONE`), and unknown ones with the closest known name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

__all__ = [
    "AssistantMessage",
    "ChatRequest",
    "ImagePart",
    "ImageUrl",
    "Message",
    "PerceiveRequest",
    "StreamOptions",
    "SystemMessage",
    "TextPart",
    "UserMessage",
    "ZoomControls",
]

Detail = Literal["low", "auto", "high", "original"]
Nothing = Annotated[None, Field(description="Taken only when it is null.")]
Unused = Annotated[Any, Field(description="Taken and ignored.")]
Zero = Annotated[float, Field(ge=0, le=0)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def _off(value: bool) -> bool:
    if value:
        raise ValueError("must be false")
    return value


def _by_key(key: str, tags: dict[str, str], message: str) -> Discriminator:
    """Chooses an alternative by what stands under `key`, so that only its errors are told."""

    def choose(value: Any) -> str | None:
        found = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return tags.get(found) if isinstance(found, str) else None

    return _choice(choose, message)


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def _choice(choose: Callable[[Any], str | None], message: str) -> Discriminator:
    return Discriminator(choose, custom_error_type="no_such_kind", custom_error_message=message)


def _whole(value: Any) -> Any:
    """5.0 is the same JSON number as 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Off = Annotated[bool, AfterValidator(_off), Field(json_schema_extra={"const": False})]
One = Annotated[int, Field(ge=1, le=1), Whole]
Naught = Annotated[int, Field(ge=0, le=0), Whole]


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


class ImagePart(_Strict):
    """A picture in a user's turn."""

    type: Literal["image_url"]
    image_url: ImageUrl


_CONTENT = _choice(_text_or_list, "a text or a list of parts")
Part = Annotated[
    Annotated[TextPart, Tag("<text part>")] | Annotated[ImagePart, Tag("<image part>")],
    _by_key(
        "type",
        {"text": "<text part>", "image_url": "<image part>"},
        "a part of type text or image_url (audio, video and files are not read)",
    ),
]
TextContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")], _CONTENT]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[Part], Tag("<list>")], _CONTENT]


class SystemMessage(_Strict):
    """Instructions that come before the talk."""

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
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
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


class ZoomControls(_Strict):
    """How to look; `extra_body={"qzoom": {...}}` in OpenAI's clients.

    Args:
        zoom: overrules every picture's `detail`.
        gate_threshold: zoom at this gate score.
        region_threshold: map value above which a cell is of interest.
        max_visual_tokens: most visual tokens of all looks together.
        heatmap: put the region branch's map into the result.
    """

    zoom: Literal["auto", "never", "always"] | None = None
    gate_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    region_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    max_visual_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), Whole] | None = None
    heatmap: bool | None = None


class PerceiveRequest(_Strict):
    """A question to the gate and the region branch alone."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    qzoom: ZoomControls | None = None
    user: Unused = None
    metadata: Unused = None


class ChatRequest(_Strict):
    """One chat completion. `temperature` is 0 and `max_tokens` 128 unless said otherwise, as in `QZoom.ask`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    qzoom: ZoomControls | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=10**6), Whole] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**6), Whole] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1), Whole] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), Whole] | None = None
    ignore_eos: bool | None = None
    # Taken when they ask for what this server does anyway.
    n: One | None = None
    logprobs: Off | None = None
    top_logprobs: Naught | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    web_search_options: Nothing = None
    # Taken and ignored.
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    parallel_tool_calls: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_retention: Unused = None
    reasoning_effort: Unused = None
    verbosity: Unused = None


class TextFormat(_Strict):
    """The one format of answers."""

    type: Literal["text"]


ChatRequest.model_rebuild()
