"""What a reply answers: the text of its last answer tag, read strictly.

Only a closed tag counts, of any case and over several lines. A reply without tags is an answer only when it is short,
and only for models that answer without tags.
"""

from __future__ import annotations

import re

__all__ = ["answer_of", "well_formed", "wrap"]

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)


def answer_of(reply: str, form: str = "plain", longest_plain: int = 300) -> str | None:
    """The answer in a reply; None where there is none.

    Args:
        reply: the whole text.
        form: "tags" demands a tag; "plain" also takes a short reply as a whole.
        longest_plain: characters up to which a reply without tags is short.
    """
    found = _TAG.findall(reply)
    if found:
        return str(found[-1]).strip() or None
    text = reply.strip()
    if form == "tags" or not text or len(text) > longest_plain or "<answer>" in text.lower():
        return None
    return text


def well_formed(reply: str, form: str = "plain", longest_plain: int = 300) -> bool:
    """Whether a reply has the demanded form: with tags exactly one answer, and nothing after it."""
    if form == "plain":
        return answer_of(reply, form, longest_plain) is not None
    tags = _TAG.findall(reply)
    return len(tags) == 1 and bool(str(tags[0]).strip()) and reply.rstrip().lower().endswith("</answer>")


def wrap(answer: str, form: str = "plain") -> str:
    """The reply that gives an answer in a form."""
    return f"<answer>{answer}</answer>" if form == "tags" else answer
