"""A JSON object (see `limits.read_payload`) to a checked request; what is wrong becomes one sentence with its field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from qzoom.serving.errors import ApiError

__all__ = ["validate"]

Model = TypeVar("Model", bound=pydantic.BaseModel)

NOT_DONE = {
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


def validate(model: type[Model], raw: dict[str, Any]) -> Model:
    """Check a parsed body.

    Raises:
        ApiError: status 400; its sentence and `param` name the first field that is wrong.
    """
    try:
        return model.model_validate(raw)
    except pydantic.ValidationError as error:
        raise _explain(model, error.errors(include_url=False)[0]) from error


def _explain(model: type[pydantic.BaseModel], worst: Mapping[str, Any]) -> ApiError:
    kind, location = worst["type"], worst["loc"]
    *above, last = location or ("",)
    path = [step for step in above if not _is_tag(step)]
    if kind == "extra_forbidden" or not _is_tag(last):
        path.append(last)
    where = _written(path)
    if kind == "extra_forbidden":
        return ApiError(400, _unknown(str(last), _known_names(model)), param=where, code="unknown_field")
    special = next((str(name) for name in path if name in NOT_DONE), None)
    if special is not None:
        return ApiError(400, f"{where}: {NOT_DONE[special]}", param=where, code="unsupported")
    text = _WORDS[kind].format(**worst.get("ctx", {})) if kind in _WORDS else _sentence(str(worst["msg"]))
    return ApiError(400, f"{where}: {text}", param=where)


def _is_tag(step: int | str) -> bool:
    """Whether a step of a location names an alternative (see `protocol`) and no field."""
    return isinstance(step, str) and step.startswith("<")


def _written(path: Sequence[int | str]) -> str:
    out = ""
    for step in path:
        out += f"[{step}]" if isinstance(step, int) else f".{ascii(step)[1:-1][:60]}" if out else ascii(step)[1:-1][:60]
    return out or "the body"


def _unknown(name: str, known: Sequence[str]) -> str:
    shown = ascii(name)[:80]
    close = difflib.get_close_matches(name[:80], known, n=1)
    return f"Unknown field {shown}; " + (f"did you mean {close[0]!r}?" if close else "leave it out.")


def _known_names(model: type[pydantic.BaseModel]) -> list[str]:
    """All field names of a model and of the models inside it."""
    schema = model.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def _sentence(text: str) -> str:
    """A validator's remark as the end of a sentence of ours."""
    text = text.removeprefix("Input should be ").removeprefix("Input ").rstrip(".")
    return f"it must be {text}." if text else "it is not valid."
