"""What a response means."""

from __future__ import annotations

import email.utils
import time

import pytest

from qzoom.llm.cache import Failure, Reply
from qzoom.llm.client import read_reply
from tests.llm.stub import completion


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion("A4", (7, 3)), Reply("A4", False, "stub-1", 7, 3)),
        (completion("A4 bec", finish="length"), Reply("A4 bec", True, "stub-1", 100, 10)),
        (
            completion([{"type": "text", "text": "A"}, {"type": "text", "text": "4"}]),
            Reply("A4", False, "stub-1", 100, 10),
        ),
        (completion(None), Reply("", False, "stub-1", 100, 10)),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "7"}, "model": 3}', Reply("x")),
        (b'{"choices": [{"message": {"content": "a\\ud800b"}}]}', Reply("a?b")),
    ],
)
def test_completions_are_read(body: bytes, reply: Reply) -> None:
    assert read_reply(200, None, body) == reply


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}',
     b'{"choices": [{"message": {"content": 3}}]}', b"\xff\xfe", b"[" * 100_000],
)  # fmt: skip
def test_bodies_that_are_no_completion_may_pass(body: bytes) -> None:
    assert read_reply(200, None, body) == Failure("transient", "a reply that is no chat completion")


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((408, 409, 425, 429, 500, 502, 503, 504, 529), "transient"),
        ((400, 413, 422), "refused"),
        ((401, 403, 404, 402, 405, 301), "fatal"),
    ],
)
def test_statuses_are_told_apart(statuses: tuple[int, ...], kind: str) -> None:
    for status in statuses:
        outcome = read_reply(status, None, b'{"error": {"message": "no"}}')
        assert isinstance(outcome, Failure)
        assert (status, outcome.kind) == (status, kind)


def test_an_unknown_model_is_fatal_whatever_the_status() -> None:
    body = b'{"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}'
    assert read_reply(400, None, body) == Failure(
        "fatal", "it does not know the model or the address (HTTP 400): The model `x` does not exist (model_not_found)"
    )
    assert read_reply(404, None, b"not here").kind == "fatal"


def test_complaints_are_one_short_line() -> None:
    refused = read_reply(413, None, b'{"error": "too\\nlong ' + b"x" * 1000 + b'"}')
    assert isinstance(refused, Failure)
    assert refused.reason.startswith("HTTP 413: too long xxx")
    assert len(refused.reason) < 220


@pytest.mark.parametrize(
    ("value", "wait"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)]
)
def test_retry_after_in_seconds(value: str | None, wait: float | None) -> None:
    assert read_reply(429, value, b"") == Failure("transient", "HTTP 429", wait)


def test_retry_after_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    found = read_reply(503, date, b"")
    assert isinstance(found, Failure)
    assert found.wait_s is not None
    assert 60 < found.wait_s <= 100
