"""The pages of a PDF as pictures, drawn as a person sees them; text layers, scripts and attachments are not read.

All pages that are read of one file share the pixels of `ImageLimits.max_pixels`: they are drawn at 200 dots per inch,
or at fewer so that they fit. Counts and sizes are checked before anything is drawn, and a process of its own draws
(`pdf_child`), within limits of memory and time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qzoom.errors import ConfigError
from qzoom.images import pdf_child
from qzoom.images.limits import ImageLimits, check_size, refuse

POINTS_PER_INCH = 72
BEST_DPI, LEAST_DPI = 200, 72
_HEAD_BYTES = 1024
_CHILD_BYTES = 2 << 30
_RANGE = re.compile(r"(\d{1,7})(?:\s*(-)\s*(\d{1,7})?)?")
_REASONS = {
    "password": ("it is protected by a password", "print it into a new PDF without one"),
    "security": ("it is protected in a way that cannot be read here", "print it into a new PDF"),
    "damaged": ("it is a PDF that is damaged or cut off", "save or download it again, or print it into a new PDF"),
}


@dataclass(frozen=True, slots=True)
class PdfPage:
    """Where a drawn page comes from."""

    number: int  # from 1, counted in the file
    pages: int  # of the whole file
    dpi: float  # dots per inch that it was drawn at

    def points(self, box: Sequence[float]) -> tuple[float, ...]:
        """A box in pixels as points (1/72 inch) from the page's top left corner, to a tenth."""
        return tuple(round(value * POINTS_PER_INCH / self.dpi, 1) for value in box)


def is_pdf(data: bytes) -> bool:
    """Whether the bytes are those of a PDF, which may begin with blanks."""
    return data[:_HEAD_BYTES].lstrip(b"\xef\xbb\xbf\0 \t\r\n").startswith(b"%PDF")


def parse_pages(text: str, count: int, most: int | None = None) -> list[int]:
    """Page numbers, from 1, in the order in which they were asked for; none twice.

    Args:
        text: such as "1-5,9" or "3-"; "" for all.
        count: pages of the file.
        most: numbers beyond this one are not collected, however long a range is.

    Raises:
        ConfigError: another form, or a page that the file does not have.
    """
    numbers: dict[int, None] = {}
    for part in text.split(",") if text.strip() else [f"1-{count}"]:
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{text!r} names no pages; write numbers and ranges, such as 1-5,9.")
        first, last = int(match[1]), int(match[3] or (count if match[2] else match[1]))
        wrong = next((number for number in (first, last) if not 1 <= number <= count), None)
        if wrong is not None:
            pages = "1 page" if count == 1 else f"{count} pages"
            raise ConfigError(f"The PDF has {pages}, so there is no page {wrong}; choose from 1 to {count}.")
        if first > last:
            raise ConfigError(f"The range {part.strip()!r} ends before it begins; write {last}-{first}.")
        numbers |= dict.fromkeys(range(first, last + 1 if most is None else min(last, first + most) + 1))
    return list(numbers)


def draw_pages(
    data: bytes, name: str, limits: ImageLimits, pages: str = ""
) -> list[tuple[Image.Image, PdfPage, tuple[str, ...]]]:
    """Draw pages of a PDF.

    Args:
        limits: pages, pixels of all pages together, seconds, and what holds for every picture.

    Returns:
        For every page the RGB picture, where it comes from, and notes (on the first page).

    Raises:
        ImageError: it cannot be read, or only beyond the limits.
        ConfigError: pages that it does not have.
    """
    if importlib.util.find_spec("pypdfium2") is None:
        raise refuse(name, "it is a PDF, and pypdfium2 is not installed", "install qzoom[pdf], or save pages as PNG")
    child = subprocess.Popen(
        [sys.executable, "-P", str(Path(pdf_child.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    late = threading.Event()

    def give_up() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(limits.max_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        return _talk(child, data, name, limits, pages)
    except (OSError, EOFError, json.JSONDecodeError) as error:
        if late.is_set():
            what = f"drawing its pages takes longer than the limit of {limits.max_seconds:.4g} s"
            raise refuse(name, what, "choose fewer pages, or print it into a new PDF") from error
        raise refuse(name, *_REASONS["damaged"]) from error
    finally:
        timer.cancel()
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not sent cannot be sent any more
                    stream.close()
        child.wait()


def _talk(
    child: subprocess.Popen[bytes], data: bytes, name: str, limits: ImageLimits, pages: str
) -> list[tuple[Image.Image, PdfPage, tuple[str, ...]]]:
    """Ask the drawing process for facts, sizes and pages, and check each before the next."""
    assert child.stdin is not None
    seconds = math.ceil(limits.max_seconds) + 1
    _say(child, {"bytes": len(data), "memory_bytes": _CHILD_BYTES + len(data), "seconds": seconds})
    child.stdin.write(data)
    child.stdin.flush()
    facts = _hear(child, name)
    count = int(facts["pages"])
    if count < 1:
        raise refuse(name, "it is a PDF without pages", "save or download it again")
    numbers = parse_pages(pages, count, limits.max_pages)
    if len(numbers) > limits.max_pages:
        what = f"it has {count} pages, and more than the limit of {limits.max_pages} would be read"
        raise refuse(name, what, f"choose some of them, such as pages 1-{limits.max_pages}")
    _say(child, numbers)
    sizes = _hear(child, name)["sizes"]
    dpi = _resolution(sizes, numbers, name, limits)
    scale = dpi / POINTS_PER_INCH
    for number, size in zip(numbers, sizes, strict=True):
        check_size(pdf_child.drawn_size(size, scale), f"page {number} of {name}", limits)
    _say(child, scale)
    drawn = []
    for number, size in zip(numbers, sizes, strict=True):
        width, height = _hear(child, name)["size"]
        if max(abs(a - b) for a, b in zip((width, height), pdf_child.drawn_size(size, scale), strict=True)) > 1:
            raise EOFError  # not the page that was asked for
        image = Image.frombuffer("RGB", (width, height), _exactly(child, 3 * width * height), "raw", "RGB", 0, 1)
        drawn.append((image, PdfPage(number, count, dpi), ()))
    notes = _notes(drawn[0][1], len(drawn), scripts=bool(facts["scripts"]))
    return [(image, page, () if i else notes) for i, (image, page, _) in enumerate(drawn)]


def _resolution(sizes: Sequence[Sequence[float]], numbers: Sequence[int], name: str, limits: ImageLimits) -> float:
    """Dots per inch at which all pages together have no more pixels than the limit."""
    square_inches = [width * height / POINTS_PER_INCH**2 for width, height in sizes]
    dpi = min(BEST_DPI, math.floor(math.sqrt(0.995 * limits.max_pixels / max(sum(square_inches), 1e-9))))
    if dpi < LEAST_DPI:
        largest = max(range(len(numbers)), key=square_inches.__getitem__)
        width, height = (value / POINTS_PER_INCH for value in sizes[largest])
        what = (
            f"within {limits.max_pixels / 1e6:.4g} megapixels its pages could be drawn at {dpi} dots per inch only, "
            f"which shows no small print (the largest, page {numbers[largest]}, has {width:.4g} x {height:.4g} inches)"
        )
        raise refuse(
            name, what, "choose fewer or smaller pages, or load the model with image_limits=ImageLimits(max_pixels=...)"
        )
    return dpi


def _notes(page: PdfPage, drawn: int, *, scripts: bool) -> tuple[str, ...]:
    which = f"{drawn} of {page.pages} pages" if drawn < page.pages else f"all {drawn} pages"
    which = "the only page" if page.pages == 1 else which
    note = f"{which} of the PDF as drawn at {page.dpi:.4g} dots per inch; text layers are not read"
    return (note, "scripts in the PDF are not run") if scripts else (note,)


def _say(child: subprocess.Popen[bytes], value: Any) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(value).encode() + b"\n")
    child.stdin.flush()


def _hear(child: subprocess.Popen[bytes], name: str) -> dict[str, Any]:
    """The next line of the drawing process (ImageError: it cannot go on; EOFError: it ended)."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise EOFError
    facts: dict[str, Any] = json.loads(line)
    if "page" in facts:
        raise refuse(name, f"page {facts['page']} is damaged or too complex to be drawn", "choose other pages")
    if "error" in facts:
        raise refuse(name, *_REASONS[facts["error"]])
    return facts


def _exactly(child: subprocess.Popen[bytes], count: int) -> bytes:
    assert child.stdout is not None
    data = child.stdout.read(count)
    if len(data) < count:
        raise EOFError
    return data
