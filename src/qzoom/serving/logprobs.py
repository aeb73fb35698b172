"""Log probabilities in OpenAI's shape: each token as text and as bytes, since a token may be part of a character."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from typing_extensions import TypedDict

from qzoom.types import TokenLogprob


class TopToken(TypedDict):
    """A token and its natural log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TopToken):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TopToken]


class LogprobRecord(TypedDict):
    """One entry per token of the answer."""

    content: list[ChosenToken]
    refusal: None


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
