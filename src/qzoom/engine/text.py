"""Token ids to text, piece by piece: no half characters, nothing past a stop text."""

from __future__ import annotations

from typing import Any

__all__ = ["TextStream"]


class TextStream:
    """Text of one answer as its tokens arrive.

    Args:
        tokenizer: decodes ids; special tokens are left out.
        stop: texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the new text that is certain."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        hits = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            self.text = text[: min(hits)]
            return self._release(len(self.text))
        self.text = text
        certain = len(text.rstrip("�")) if text.endswith("�") else len(text)
        for stop in self._stop:
            certain = min(certain, len(text) - _overlap(text, stop))
        return self._release(certain)

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._release(len(self.text))

    def _release(self, until: int) -> str:
        piece = self.text[self._sent : until]
        self._sent = max(self._sent, until)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
