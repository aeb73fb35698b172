"""Roles behind OpenAI-compatible endpoints: what each sends, and what counts as a usable reply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from qzoom.distill import prompts
from qzoom.distill.answer import extract_answer
from qzoom.distill.items import Asked, Item, QuestionKind, Vote
from qzoom.distill.roles import asked_of
from qzoom.errors import CallRefusedError
from qzoom.llm.client import Client, ImagePart, Message

if TYPE_CHECKING:
    from PIL.Image import Image

    from qzoom.distill.items import Views

__all__ = ["EndpointAsker", "EndpointMaker", "EndpointReader", "EndpointTeacher", "EndpointValidator"]


_TRIES = 3
"""Samples of a reply that must be JSON before it is given up."""
_BEGINNINGS = 20
_KINDS: dict[str, QuestionKind] = {kind: kind for kind in get_args(QuestionKind)} | {"color": "colour"}
_CHECKS = (
    ("answerable", "not answerable from the crop"),
    ("unique", "not unique in the whole picture"),
    ("same_answer", "another answer in the whole picture"),
    ("clean", "the question gives something away"),
)
_LONGEST_QUESTION = 400


@dataclass(frozen=True, slots=True)
class _Behind:
    """What all of them have.

    Args:
        client: of this member.
        max_pixels: of a picture that is sent.
        plain: put bare texts.
    """

    client: Client
    max_pixels: int = 4_194_304
    plain: bool = False

    @property
    def name(self) -> str:
        """As in the recipe."""
        return self.client.name

    @property
    def model(self) -> str:
        """What answers."""
        return self.client.model

    def _shown(self, image: Image) -> ImagePart:
        return ImagePart(image, self.max_pixels)


@dataclass(frozen=True, slots=True)
class EndpointAsker(_Behind):
    """Writes questions from the crop alone.

    Args:
        count: most questions per crop.
    """

    count: int = 3

    def ask(self, item: Item, views: Views) -> Sequence[Asked]:
        """Questions without repeats; none when no reply is a list of questions."""
        chat = [Message("user", (self._shown(views.crop(item)), prompts.ask_text(self.count)))]
        rows = _json_reply(self.client, chat, list)
        out: dict[str, Asked] = {}
        for row in rows or ():
            text = row.get("question") if isinstance(row, dict) else row
            if isinstance(text, str) and 0 < len(text.strip()) <= _LONGEST_QUESTION:
                text = " ".join(text.split())
                kind = str(row.get("kind", "")).strip().casefold() if isinstance(row, dict) else ""
                out.setdefault(text.casefold(), Asked(text, _KINDS.get(kind, "other"), self.name))
        return tuple(out.values())[: self.count]


@dataclass(frozen=True, slots=True)
class EndpointValidator(_Behind):
    """Compares the whole picture with the crop."""

    def check(self, item: Item, views: Views) -> str:
        """The first thing that is wrong, "" when nothing is."""
        pictures = (self._shown(views.whole(item)), self._shown(views.crop(item)))
        verdict = _json_reply(
            self.client, [Message("user", (*pictures, prompts.check_text(asked_of(item).text)))], dict
        )
        if verdict is None or any(not isinstance(verdict.get(name), bool) for name, _ in _CHECKS):
            return "the validator gave no usable verdict"
        return next((reason for name, reason in _CHECKS if not verdict[name]), "")


@dataclass(frozen=True, slots=True)
class EndpointTeacher(_Behind):
    """Answers from the crop; `plain` puts the bare question."""

    def answer(self, item: Item, views: Views, sample: int) -> Vote:
        """One sample; what cannot be read as an answer is a failed vote."""
        question = asked_of(item).text
        text = question if self.plain else prompts.teacher_text(question)
        reply = self.client.call([Message("user", (self._shown(views.crop(item)), text))], sample)
        return extract_answer(reply.text, cut_off=reply.cut_off).vote(self.name, sample)


@dataclass(frozen=True, slots=True)
class EndpointReader(_Behind):
    """The student or the guesser; `plain` puts the bare text."""

    def read(self, item: Item, image: Image | None, text: str, sample: int) -> Vote:
        """One sample; a refused call is a failed one."""
        asked = text if self.plain else prompts.reader_text(text)
        parts = (asked,) if image is None else (self._shown(image), asked)
        try:
            reply = self.client.call([Message("user", parts)], sample)
        except CallRefusedError as error:
            return Vote(self.name, sample, "", "failed", str(error))
        return extract_answer(reply.text, cut_off=reply.cut_off).vote(self.name, sample)


@dataclass(frozen=True, slots=True)
class EndpointMaker(_Behind):
    """Writes wrong options."""

    def distractors(self, item: Item, views: Views, count: int) -> Sequence[str]:
        """Texts as they came; the step checks them."""
        if item.answer is None:
            return ()
        text = prompts.make_text(asked_of(item).text, item.answer.text, count)
        rows = _json_reply(self.client, [Message("user", (self._shown(views.crop(item)), text))], list)
        return [" ".join(row.split()) for row in rows or () if isinstance(row, str) and 0 < len(row) <= 200]


def _json_reply(client: Client, chat: Sequence[Message], kind: type) -> Any:
    """The first list or object in a reply, of up to three samples; None when none has one."""
    for sample in range(_TRIES):
        value = _first_json(client.call(chat, sample).text.rpartition("</think>")[2], kind)
        if value is not None:
            return value
    return None


def _first_json(text: str, kind: type) -> Any:
    """The first list or object that a text holds, of its first few beginnings of one."""
    decoder = json.JSONDecoder()
    start = -1
    for _ in range(_BEGINNINGS):
        start = text.find("[" if kind is list else "{", start + 1)
        if start < 0:
            break
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    return None
