"""Kinds of values in request bodies, and what is said of the fields that clients send beside the ones that count.

`KNOWN` and `KNOWN_OF_TURNS` list fields that change nothing here: the values taken, and what is said of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def _whole(value: Any) -> Any:
    """5.0 is the same JSON number as 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_or_list(value: Any) -> str | None:
    """The tag of a text or a list; None for anything else."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def choice(choose: Callable[[Any], str | None], message: str) -> Discriminator:
    """Chooses an alternative by its tag; the message says what there is."""
    return Discriminator(choose, custom_error_type="no_such_kind", custom_error_message=message)


def by_key(key: str, tags: dict[str, str], message: str) -> Discriminator:
    """Chooses an alternative by the value under `key`, so that only its errors are reported."""

    def choose(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return tags.get(name) if isinstance(name, str) else None

    return choice(choose, message)


Detail = Literal["low", "auto", "high", "original"]
Nothing = Annotated[None, Field(description="Taken only when it is null.")]
Unused = Annotated[Any, Field(description="Taken and ignored.")]
Empty = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
Unit = Annotated[float, Field(ge=1, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Whole = BeforeValidator(_whole)
One = Annotated[int, Field(ge=1, le=1), Whole]
Naught = Annotated[int, Field(ge=0, le=0), Whole]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1), Whole]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")] | Annotated[list[StopText], Field(max_length=16), Tag("<list>")],
    choice(text_or_list, "a text or a list of texts"),
]


class Strict(BaseModel):
    """No unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaRules(Strict):
    """A JSON schema; `strict` changes nothing, since answers always follow it."""

    name: Unused = None
    description: Unused = None
    rules: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    """A JSON value of a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaRules


class ThinkingOff(Strict):
    """Thinking that is turned off."""

    type: Literal["disabled"]


class TemplateOptions(Strict):
    """Options of chat templates, turned off."""

    enable_thinking: Literal[False] | None = None
    thinking: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None


_PENALTIES = "this server has presence_penalty and frequency_penalty only; leave it out or set it to"
_SHAPES = "a form of answers is asked for by 'response_format' of type json_schema; leave it out."
_TEMPLATE = "the model's own chat template is used as it is; leave it out."
_CHANCES = "this server does not change the odds of tokens; leave it out."
_TOOLS = "the model calls no tools; leave them out."
TURN_TOOLS = "calls of tools are not read; leave this turn out, or write what it said into 'content'."
_ANSWERS = "only turns of the assistant have it; leave it out."

KNOWN: dict[str, tuple[Any, str]] = {
    "best_of": (One, "all answers are given, none is chosen; leave it out and set 'n'."),
    "use_beam_search": (Literal[False], "this server searches no beams; leave it out or set it to false."),
    "length_penalty": (Unit, f"{_PENALTIES} 1."),
    "prompt_logprobs": (Nothing, "this server gives log probabilities of answers only; leave it out."),
    "repetition_penalty": (Unit, f"{_PENALTIES} 1."),
    "no_repeat_ngram_size": (Naught, f"{_PENALTIES} 0."),
    "min_p": (Zero, "this server samples with temperature, top_p and top_k only; leave it out or set it to 0."),
    "typical_p": (Unit, "this server samples with temperature, top_p and top_k only; leave it out or set it to 1."),
    "min_tokens": (Naught, "an answer ends where the model ends it; leave it out or set it to 0."),
    "logit_bias": (EmptyObject, _CHANCES),
    "bad_words": (Empty, _CHANCES),
    "allowed_token_ids": (Empty, _CHANCES),
    "logits_processors": (Empty, _CHANCES),
    "stop_token_ids": (Empty, "answers end at texts; leave it out and give 'stop'."),
    "include_stop_str_in_output": (Literal[False], "a stop text is never part of the answer; leave it out."),
    "skip_special_tokens": (Literal[True], "answers have no special tokens; leave it out or set it to true."),
    "return_token_ids": (Literal[False], "answers are texts; leave it out or set it to false."),
    "return_tokens_as_token_ids": (Literal[False], "answers are texts; leave it out or set it to false."),
    "echo": (Literal[False], "an answer does not repeat the question; leave it out or set it to false."),
    "truncate_prompt_tokens": (Nothing, "no prompt is cut; leave it out and shorten the messages."),
    "guided_json": (Nothing, _SHAPES),
    "guided_regex": (Nothing, _SHAPES),
    "guided_choice": (Nothing, _SHAPES),
    "guided_grammar": (Nothing, _SHAPES),
    "structured_outputs": (Nothing, _SHAPES),
    "modalities": (
        Annotated[list[Literal["text"]], Field(max_length=1)],
        "answers are text only; leave it out or set it to ['text'].",
    ),
    "audio": (Nothing, "the model neither hears nor speaks; leave it out."),
    "tools": (Empty, _TOOLS),
    "tool_choice": (Literal["none", "auto"], "the model calls no tools; leave it out."),
    "functions": (Empty, "the model calls no functions; leave them out."),
    "function_call": (Literal["none", "auto"], "the model calls no functions; leave it out."),
    "prediction": (Nothing, "this server takes no predicted answers; leave it out."),
    "web_search_options": (Nothing, "this server searches nothing; leave it out."),
    "documents": (Empty, "this server reads no documents; leave them out."),
    "chat_template": (Nothing, _TEMPLATE),
    "chat_template_kwargs": (TemplateOptions, _TEMPLATE),
    "add_generation_prompt": (Literal[True], _TEMPLATE),
    "continue_final_message": (Literal[False], "an answer is a turn of its own; leave it out or set it to false."),
    "add_special_tokens": (Literal[False], _TEMPLATE),
    "mm_processor_kwargs": (EmptyObject, "pictures are sized by 'qzoom.max_visual_tokens'; leave it out."),
    "enable_thinking": (Literal[False], "the model does not think aloud; leave it out or set it to false."),
    "thinking": (ThinkingOff, "the model does not think aloud; leave it out."),
    "priority": (Naught, "all requests have the same priority; leave it out or set it to 0."),
    "cache_salt": (Nothing, "caches are apart by API key; leave it out."),
    "store": (Unused, ""),
    "parallel_tool_calls": (Unused, ""),
    "service_tier": (Unused, ""),
    "safety_identifier": (Unused, ""),
    "prompt_cache_key": (Unused, ""),
    "prompt_cache_retention": (Unused, ""),
    "reasoning_effort": (Unused, ""),
    "include_reasoning": (Unused, ""),
    "verbosity": (Unused, ""),
    "spaces_between_special_tokens": (Unused, ""),
    "request_id": (Unused, ""),
}
"""Fields of a chat request that change nothing: the values that are taken, and what is said of others. Null always is
taken."""

KNOWN_OF_TURNS: dict[str, tuple[Any, str]] = {
    "name": (Unused, ""),
    "cache_control": (Unused, ""),
    "id": (Unused, ""),
    "tool_calls": (Empty, TURN_TOOLS),
    "tool_call_id": (Nothing, TURN_TOOLS),
    "function_call": (Nothing, TURN_TOOLS),
    "audio": (Nothing, "the model neither hears nor speaks; leave it out."),
    "parsed": (Unused, ""),
}
"""The same for messages of every role."""

_OUTPUT_ONLY = (
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking_blocks",
    "provider_specific_fields",
    "annotations",
    "citations",
    "images",
    "qzoom",
)
"""What servers and clients add to answers: ignored when it comes back in a turn of the assistant."""
_PART_EXTRAS: dict[str, tuple[Any, str]] = dict.fromkeys(("cache_control", "annotations", "id", "index"), (Unused, ""))
_PICTURE_EXTRAS: dict[str, tuple[Any, str]] = dict.fromkeys(("format", "uuid"), (Unused, ""))
_FILE_EXTRAS: dict[str, tuple[Any, str]] = {
    "filename": (Unused, ""),
    "format": (Unused, ""),
    "file_id": (Nothing, "this server keeps no files; leave it out and send the file itself as 'file_data'."),
}
_ONLY_ANSWERS: dict[str, tuple[Any, str]] = dict.fromkeys(("refusal", *_OUTPUT_ONLY), (Nothing, _ANSWERS))
SENTENCES = {name: sentence for name, (_, sentence) in (_ONLY_ANSWERS | _FILE_EXTRAS | KNOWN_OF_TURNS | KNOWN).items()}
del SENTENCES["qzoom"]  # as a field of the request it has its own checks


def _with(table: Mapping[str, tuple[Any, str]]) -> Any:
    """A base class that has a table's fields, each of which may also be null."""
    fields: dict[str, Any] = {name: (Optional[kind], None) for name, (kind, _) in table.items()}  # noqa: UP045
    return pydantic.create_model("_Known", __base__=Strict, **fields)


if TYPE_CHECKING:
    KnownOfRequest = Strict
    KnownOfTurn = Strict
    KnownOfAnswer = Strict
    PartExtras = Strict
    PictureExtras = Strict
    ImagePartExtras = Strict
    FileExtras = Strict
else:
    KnownOfRequest = _with(KNOWN)
    KnownOfTurn = _with(KNOWN_OF_TURNS | _ONLY_ANSWERS)
    KnownOfAnswer = _with(KNOWN_OF_TURNS | dict.fromkeys(_OUTPUT_ONLY, (Unused, "")))
    PartExtras = _with(_PART_EXTRAS)
    PictureExtras = _with(_PICTURE_EXTRAS)
    ImagePartExtras = _with(_PART_EXTRAS | _PICTURE_EXTRAS)
    FileExtras = _with(_FILE_EXTRAS)
