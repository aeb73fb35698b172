"""What a response means."""

from __future__ import annotations

import email.utils
import time

import pytest

from qzoom.llm.cache import Fatal, Passing, Refused, Reply, read_reply
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
    assert read_reply(200, None, body) == Passing("a reply that is no chat completion")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(408, Passing), (409, Passing), (425, Passing), (429, Passing), (500, Passing), (502, Passing), (503, Passing),
     (504, Passing), (529, Passing), (400, Refused), (413, Refused), (422, Refused), (401, Fatal), (403, Fatal),
     (404, Fatal), (402, Fatal), (405, Fatal), (301, Fatal)],
)  # fmt: skip
def test_statuses_are_told_apart(status: int, kind: type) -> None:
    assert isinstance(read_reply(status, None, b'{"error": {"message": "no"}}'), kind)


def test_an_unknown_model_is_fatal_whatever_the_status() -> None:
    body = b'{"error": {"message": "The model `x` does not exist", "code": "model_not_found"}}'
    assert read_reply(400, None, body) == Fatal(
        "it does not know the model or the address (HTTP 400): The model `x` does not exist (model_not_found)"
    )
    assert isinstance(read_reply(404, None, b"not here"), Fatal)


def test_complaints_are_one_short_line() -> None:
    refused = read_reply(413, None, b'{"error": "too\\nlong ' + b"x" * 1000 + b'"}')
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("HTTP 413: too long xxx")
    assert len(refused.reason) < 220


@pytest.mark.parametrize(
    ("value", "wait"), [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("nan", None), (None, None)]
)
def test_retry_after_in_seconds(value: str | None, wait: float | None) -> None:
    assert read_reply(429, value, b"") == Passing("HTTP 429", wait)


def test_retry_after_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    found = read_reply(503, date, b"")
    assert isinstance(found, Passing)
    assert found.wait_s is not None
    assert 60 < found.wait_s <= 100
