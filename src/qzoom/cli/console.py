"""Where commands print: answers on standard output, everything else on standard error.

Scripts read standard output, people read both; `--quiet` silences standard error except for errors.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

Update = Callable[..., None]
"""`update(done, total, text="")` of one progress bar; a total of None keeps the known one."""

FEW_SAMPLES = 32
"""Fewer samples than these say nothing about a method."""
_KEPT = "\n\t"
_DIRECTION = set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def printable(text: str) -> str:
    """The text without control and direction-changing characters, so that an answer cannot steer a terminal."""
    return "".join(
        c for c in text if c in _KEPT or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTION)
    )


def one_line(text: str) -> str:
    """The text on one line, runs of white space as one space."""
    return " ".join(printable(text).split())


class Console:
    """The two streams of one command. `quiet`: say nothing on standard error except errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        if quiet:  # read when the libraries are imported
            for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(name, "1")
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")

    @property
    def live(self) -> bool:
        """Whether a person watches standard output."""
        return _is_terminal(sys.stdout)

    def note(self, text: str) -> None:
        """A remark for people, on standard error."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """A piece of the answer, shown at once."""
        sys.stdout.write(_encodable(printable(text) if self.live else text))
        sys.stdout.flush()

    def result(self, text: str) -> None:
        """A whole answer on lines of its own."""
        self.write(f"{text}\n")

    def record(self, values: dict[str, Any]) -> None:
        """One JSON line."""
        sys.stdout.write(json.dumps(values, allow_nan=False) + "\n")
        sys.stdout.flush()

    def warn_few(self, what: str, count: int, advice: str) -> None:
        """Say that a figure from so few samples means nothing."""
        if count < FEW_SAMPLES:
            self.note(f"warning: {what}; so few say nothing about the method. {advice}")

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a remark for as long as a block takes; only where a person watches standard error."""
        shown = not self.quiet and _is_terminal(sys.stderr)
        if shown:
            print(printable(text), end="", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            if shown:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, *titles: str, note_every_s: float | None = None) -> Iterator[list[Update]]:
        """Progress bars with rate and time left on standard error, one per title, where a person watches it.

        Args:
            titles: of the bars.
            note_every_s: elsewhere, print a line of progress so often, and at the end; None prints nothing.
        """
        if self.quiet or not _is_terminal(sys.stderr):
            yield [self._noting(title, None if self.quiet else note_every_s) for title in titles]
            return
        import rich.console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(
            *columns, TimeRemainingColumn(), console=rich.console.Console(stderr=True), transient=True
        ) as bars:

            def bar(title: str) -> Update:
                task = bars.add_task(title, total=None, rate="", visible=len(titles) == 1)

                def update(done: int, total: int | None = None, text: str = "") -> None:
                    speed = bars.tasks[task].speed
                    rate = f"{speed:.2f}/s" if speed else ""
                    bars.update(task, completed=done, total=total, visible=True, rate=rate, description=text or title)

                return update

            yield [bar(title) for title in titles]

    def _noting(self, title: str, every_s: float | None) -> Update:
        """An update that prints a line now and then."""
        last = 0.0

        def update(done: int, total: int | None = None, text: str = "") -> None:
            nonlocal last
            if every_s is not None and (time.monotonic() - last > every_s or done == total):
                last = time.monotonic()
                self.note(f"{title} {done} of {total}: {text}" if text else f"{title} {done} of {total}")

        return update

    def hush_libraries(self) -> None:
        """Keep the progress bars and advice of the libraries off the screen; downloads show theirs on a terminal."""
        import transformers

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to install kernels for CPUs
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if self.quiet or not _is_terminal(sys.stderr):
            import huggingface_hub.utils

            huggingface_hub.utils.disable_progress_bars()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _encodable(text: str) -> str:
    """The text as the stream can show it; characters that its encoding lacks become escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
