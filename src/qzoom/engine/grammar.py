"""Answers that follow a JSON schema: which tokens may come next.

llguidance walks the schema's grammar beside the answer, token by token; nothing is compiled for the whole vocabulary in
advance, and its limits bound what a schema may cost at each token. What it cannot follow it refuses, so that an answer
that has ended always fits the schema.
"""

from __future__ import annotations

import json
import re
import threading
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoom.backbones.base import Backbone
from qzoom.errors import ConfigError, SchemaError

ANY_OBJECT = '{"type": "object"}'
_STEPS = 1000
_COPYING = threading.Lock()
_STYLE = {
    "whitespace_flexible": False,  # a model may otherwise write blanks for ever
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


class JsonGrammar:
    """One answer's place in the grammar of its schema (SchemaError: the grammar cannot follow it; ConfigError:
    llguidance is not installed)."""

    def __init__(self, backbone: Backbone, schema: str) -> None:
        start = _start(backbone.tokenizer, backbone.text_config.vocab_size, backbone.eos_ids, schema)
        with _COPYING:
            self._matcher = start.deep_copy()

    @property
    def ended(self) -> bool:
        """Whether nothing but the end can come."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (vocabulary,) with minus infinity for every token that may not come next (SchemaError: the grammar has
        become too large)."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher, "The JSON schema became too complex for the answer")
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
        return logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)

    def advance(self, token: int) -> None:
        """Go on by one token that `mask` left."""
        self._matcher.consume_token(token)
        _check(self._matcher, "The JSON schema became too complex for the answer")


@lru_cache(maxsize=8)
def _start(tokenizer: Any, size: int, eos_ids: tuple[int, ...], schema: str) -> Any:
    """The matcher at the beginning of an answer; kept, since many requests come with one schema."""
    try:
        rules = json.loads(schema)
        _check_numbers(rules)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"The JSON schema is not JSON, or too deep: {error}.") from error
    if not isinstance(rules, dict):
        raise SchemaError("The JSON schema must be an object, such as {'type': 'object', 'properties': {...}}.")
    library = _library()
    try:
        grammar = library.LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
    except ValueError as error:
        raise SchemaError(f"The JSON schema cannot be followed ({error}); simplify it.") from error
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = library.LLMatcher(_vocabulary(tokenizer, size, eos_ids), grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # some schemas fail only here
    _check(matcher, "The JSON schema cannot be followed")
    return matcher


def _check_numbers(rules: Any) -> None:
    """Refuse numbers whose automata would be too large; llguidance does not limit those."""
    entries = rules.items() if isinstance(rules, dict) else enumerate(rules) if isinstance(rules, list) else ()
    for name, value in entries:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name == "multipleOf" and int("".join(map(str, Decimal(str(value)).as_tuple().digits))) > _STEPS:
            raise SchemaError(f"The JSON schema has a multipleOf of {value}; at most {_STEPS} can be followed.")
        if number and name in ("minProperties", "maxProperties") and value > _STEPS:
            raise SchemaError(f"The JSON schema has a {name} of {value}; at most {_STEPS} can be followed.")
        _check_numbers(value)


def _check(matcher: Any, what: str) -> None:
    if matcher.is_error():
        reason = " ".join(re.split(r"\n<state>|; consider|\s<non-verbose", matcher.get_error())[0].split())
        reason = reason.replace("NoExtensionBias", "no finite text follows it")
        raise SchemaError(f"{what} ({ascii(reason)[1:-1][:200]}); simplify it.")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        text = "Answers by a JSON schema need llguidance; install it with: pip install 'qzoom[serve]'."
        raise ConfigError(text) from error
    return llguidance


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Any, size: int, eos_ids: tuple[int, ...]) -> Any:
    """The tokens as llguidance knows them; takes about a second for 150,000."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=list(eos_ids))
