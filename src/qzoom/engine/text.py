"""Token ids to text, piece by piece: no half characters, nothing past a stop text."""

from __future__ import annotations

from typing import Any

__all__ = ["TextStream"]


class TextStream:
    """Text of one answer as its tokens arrive; white space around the whole answer is left out.

    The pieces that `push` and `finish` return join to `text`.

    Args:
        tokenizer: decodes ids; special tokens are left out.
        stop: texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._raw = ""
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, up to a stop text."""
        return self._raw.strip()

    def push(self, token: int) -> str:
        """Add a token; returns the new text that is certain."""
        self._ids.append(token)
        self._raw = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        hits = [at for at in (self._raw.find(s) for s in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            self._raw = self._raw[: min(hits)]
            return self.finish()
        held = [len(self._raw) - len(self._raw.rstrip("�")), *(_overlap(self._raw, s) for s in self._stop)]
        return self._release(len(self._raw) - max(held))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return self._release(len(self._raw))

    def _release(self, until: int) -> str:
        shown = self._raw[:until].strip()
        piece = shown[self._sent :]
        self._sent = max(self._sent, len(shown))
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that could begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
