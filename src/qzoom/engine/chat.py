"""Chat messages -> template text -> token ids, with one placeholder per picture.

What a user writes is always text: a literal `<|image_pad|>` in a question is spelled out in ordinary tokens and never
becomes a placeholder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qzoom.backbones.base import Backbone
from qzoom.errors import CheckpointError, QuestionError, reason_of

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated conversation."""

    messages: tuple[dict[str, Any], ...]  # role and parts; parts are {"type": "text", "text": ...} or {"type": "image"}
    sources: tuple[Any, ...]  # the pictures in the order of the parts, as given by the caller
    question: str  # text of the last user turn; turns of one role that follow each other are one


def read_conversation(image: Any, question: str | Sequence[dict[str, Any]], system: str | None = None) -> Conversation:
    """Make one conversation of pictures and a question or chat messages.

    Args:
        image: one picture source, a list of them, or None. With messages, pictures fill the image parts that have no
            source of their own, in order; with no image part at all they go before the first user text.
        question: a text, or messages with "role" and "content" (a string or a list of parts; an image part may carry
            its source under "image", "path", "url" or "base64", and OpenAI's parts "image_url" and "file" are taken
            too). Turns of one role that follow each other are read as one, and "developer" is another name of "system".
            An assistant's turn may have null instead of a content.
        system: a system turn to put first.

    Raises:
        QuestionError: nothing to ask, unknown roles or parts, a text that is not valid Unicode, or pictures and image
            parts that do not match.
    """
    given = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    if isinstance(question, str):
        _not_blank(question)
        parts = [{"type": "image"} for _ in given] + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        sources = given
    else:
        messages, sources = _read_messages(question, given)
    if system is not None:
        if not isinstance(system, str):
            raise QuestionError(f"The system turn must be a text, not {type(system).__name__}.")
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    if messages[-1]["role"] != "user":
        raise QuestionError(f"The last message must be the user's question, not one of role {messages[-1]['role']!r}.")
    _check_unicode(messages)
    messages = _joined(messages)
    text = "".join(p["text"] for p in messages[-1]["content"] if p["type"] == "text")
    _not_blank(text)
    return Conversation(tuple(messages), tuple(sources), text)


def with_pages(conversation: Conversation, counts: Sequence[int]) -> Conversation:
    """The conversation with several image parts in place of one whose source holds several pictures."""
    if all(count == 1 for count in counts):
        return conversation
    left = iter(counts)
    messages = []
    for message in conversation.messages:
        parts = [[part] * next(left) if part["type"] == "image" else [part] for part in message["content"]]
        messages.append({**message, "content": [part for group in parts for part in group]})
    return replace(conversation, messages=tuple(messages))


def _not_blank(text: str) -> None:
    if not text.strip():
        raise QuestionError("The question is empty; ask something about the picture.")


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; those of one role that follow each other become one, with a new line between their texts."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        parts = message["content"]
        if not joined or joined[-1]["role"] != role:
            joined.append({"role": role, "content": list(parts)})
            continue
        before = joined[-1]["content"]
        if before and parts and before[-1]["type"] == parts[0]["type"] == "text":
            before.append({"type": "text", "text": "\n"})
        before.extend(parts)
    return joined


def _check_unicode(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse halves of surrogate pairs, which stand for bytes that were not valid UTF-8 and cannot be tokenised."""
    for message in messages:
        for part in message["content"]:
            found = re.search("[\ud800-\udfff]", part.get("text", ""))
            if found:
                raise QuestionError(
                    f"Character {found.start() + 1} of the {message['role']} message (U+{ord(found.group()):04X}) is "
                    "half a surrogate pair, not a character; give the text as valid UTF-8."
                )


def _read_messages(raw: Sequence[dict[str, Any]], given: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    if not isinstance(raw, list | tuple) or not raw:
        raise QuestionError("The question must be a text or a non-empty list of chat messages.")
    waiting = list(given)
    messages: list[dict[str, Any]] = []
    sources: list[Any] = []
    for number, message in enumerate(raw, start=1):
        if not isinstance(message, dict) or message.get("role") not in (*ROLES, "developer"):
            raise QuestionError(f'Message {number} must have a "role" out of {", ".join(ROLES)}.')
        content = _content(message, number)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise QuestionError(f'Message {number}: "content" must be a text or a list of parts.')
        clean = [_read_part(part, number, waiting, sources) for part in parts]
        messages.append({"role": message["role"], "content": clean})
    if waiting:
        if sources:
            raise QuestionError(f"{len(waiting)} picture(s) too many for the image parts of the messages.")
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise QuestionError("The messages have no user turn that could hold the picture.")
        first["content"] = [{"type": "image"} for _ in waiting] + first["content"]
        sources = waiting
    return messages, sources


def _content(message: dict[str, Any], number: int) -> Any:
    """A message's content; where an assistant's is null, its refusal or an empty text."""
    content = message.get("content")
    if message["role"] != "assistant":
        return content
    if message.get("tool_calls") or message.get("function_call"):
        raise QuestionError(
            f"Message {number} calls tools; calls of tools are not read: leave the turn out, or write what it said as "
            "its content."
        )
    return message.get("refusal") or "" if content is None else content


def _read_part(part: Any, number: int, waiting: list[Any], sources: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        own = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k) is not None), None)
        if kind == "image_url" and isinstance(own, dict):
            own = own.get("url")
        if own is None and part.get("base64") is not None:
            own = {"base64": part["base64"]}
        if own is None and not waiting:
            raise QuestionError(f"Message {number} has an image part without a picture.")
        sources.append(own if own is not None else waiting.pop(0))
        return {"type": "image"}
    file = part.get("file") if kind == "file" else None
    if isinstance(file, dict) and isinstance(file.get("file_data"), str):
        sources.append(file["file_data"])
        return {"type": "image"}
    raise QuestionError(f'Message {number}: a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}.')


class ChatEncoder:
    """Renders and tokenises conversations for one backbone. Safe to use from several threads."""

    def __init__(self, backbone: Backbone) -> None:
        self._tokenizer = backbone.tokenizer
        self._image_id = backbone.image_token_id
        self._placeholder = backbone.placeholder
        self._start = list(self._tokenizer("")["input_ids"])
        self._template = backbone.chat_template
        self._special = {
            str(token.content): int(i) for i, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }

    @cached_property
    def _plain(self) -> Any:
        """A tokenizer core that spells special tokens out as ordinary text."""
        core = copy.deepcopy(self._tokenizer.backend_tokenizer)
        core.encode_special_tokens = True
        return core

    @cached_property
    def _inner(self) -> Any:
        """The same for text that goes on after a special token, where SentencePiece's tokenizers put no blank."""
        core = copy.deepcopy(self._tokenizer.backend_tokenizer)
        core.encode_special_tokens = True
        if getattr(core.pre_tokenizer, "prepend_scheme", None) == "first":
            marks = core.pre_tokenizer
            marks.prepend_scheme = "never"
            core.pre_tokenizer = marks
        return core

    @cached_property
    def _takes_texts(self) -> bool:
        """Whether the template takes a turn without pictures as one text; some see parts only."""
        probe = [{"role": "user", "content": "\ue000"}]
        try:
            return "\ue000" in self._rendered(probe)
        except QuestionError:
            return False

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The template's text; templates that can think aloud first are told not to (QuestionError: the template
        refuses the messages; CheckpointError: it is not valid)."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self._template, enable_thinking=False, **options
            )
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The model's chat template is not valid ({reason_of(error)}); copy it from the base model."
            ) from error
        except (TemplateError, TypeError) as error:  # a TypeError: it takes texts for lists of parts, or the reverse
            raise QuestionError(
                f"The model's chat template refuses the messages ({reason_of(error)}); change their roles, order or "
                "parts."
            ) from error
        return text

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids up to and including the assistant header, one placeholder id per picture.

        The text is cut at the pictures, and each piece is tokenised as if it stood alone; what the tokenizer puts in
        front of every text stands in front of the first (QuestionError: a user's text that holds the family's
        placeholder of a picture, which is given apart, or messages that the template refuses).
        """
        self._refuse_placeholder(conversation)
        pattern = "|".join(re.escape(s) for s in sorted(self._special, key=len, reverse=True))
        texts = [p["text"] for m in conversation.messages for p in m["content"] if p["type"] == "text"]
        mark = _unused_character("".join(texts))
        literal: list[str] = []

        def hide(match: re.Match[str]) -> str:
            literal.append(match.group())
            return f"{mark}{len(literal) - 1}{mark}"

        messages = []
        for message in conversation.messages:
            parts = [
                {"type": "text", "text": re.sub(pattern, hide, p["text"])} if p["type"] == "text" else p
                for p in message["content"]
            ]
            text_only = self._takes_texts and all(p["type"] == "text" for p in parts)
            messages.append(
                {"role": message["role"], "content": "".join(p["text"] for p in parts) if text_only else parts}
            )
        rendered = self._rendered(messages, add_generation_prompt=True)
        ids: list[int] = []
        core = self._plain
        for piece in re.split(f"({pattern})", rendered):
            if piece in self._special:
                ids.append(self._special[piece])
                core = self._plain if ids[-1] == self._image_id or ids == self._start else self._inner
            elif piece:
                shown = re.sub(f"{mark}(\\d+){mark}", lambda m: literal[int(m.group(1))], piece)
                ids.extend(core.encode(shown, add_special_tokens=False).ids)
        return ids if ids[: len(self._start)] == self._start else self._start + ids

    def _refuse_placeholder(self, conversation: Conversation) -> None:
        for message in conversation.messages if self._placeholder else ():
            for part in message["content"]:
                text = part.get("text", "").strip()
                if text.startswith(self._placeholder) or text.endswith(self._placeholder):
                    raise QuestionError(
                        f"The text {text[:40]!r} holds {self._placeholder}, but pictures are given beside the text, so "
                        f"this one would be there twice; leave {self._placeholder} out."
                    )


def _unused_character(text: str) -> str:
    """A private-use character that does not occur in the text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
