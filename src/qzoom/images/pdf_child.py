"""Draws pages of a PDF, in a process of its own: the library that draws is not safe in threads, and what a hostile file
does to it must not reach the caller. `images/pdf.py` starts it, decides what is drawn, and ends it when time is over.

The talk, one JSON line each: limits and the file's length, then the file -> page count and facts; page numbers -> their
sizes; a scale -> for every page its size in pixels, then its RGB bytes. An {"error": ...} line ends it at any point.
"""

import contextlib
import json
import math
import sys
from typing import Any, BinaryIO

_ERRORS = {3: "damaged", 4: "password", 5: "security"}
_SCRIPTS = (b"/JavaScript", b"/JS ", b"/JS(", b"/JS<")


def limit_resources(memory_bytes: int, seconds: int) -> None:
    """Bound this process's memory and processor time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # a limit that this system does not have
            resource.setrlimit(what, (most, hard))


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Read a PDF from `source` and write what is asked for to `target`."""

    def tell(**facts: Any) -> None:
        target.write(json.dumps(facts).encode() + b"\n")
        target.flush()

    order = json.loads(source.readline())
    limit_resources(order["memory_bytes"], order["seconds"])
    data = source.read(order["bytes"])

    import pypdfium2 as pdfium
    from pypdfium2 import raw

    try:
        document = pdfium.PdfDocument(data)
        document.init_forms()
    except pdfium.PdfiumError as error:
        tell(error=_ERRORS.get(getattr(error, "err_code", None) or 3, "damaged"))
        return
    scripts = raw.FPDFDoc_GetJavaScriptActionCount(document) > 0 or any(mark in data for mark in _SCRIPTS)
    tell(pages=len(document), scripts=scripts)
    numbers = json.loads(source.readline())
    tell(sizes=[document.get_page_size(number - 1) for number in numbers])
    scale = json.loads(source.readline())
    for number in numbers:
        try:
            page = document[number - 1]
            bitmap = page.render(scale=scale, rev_byteorder=True, force_bitmap_format=raw.FPDFBitmap_BGR)
        except (pdfium.PdfiumError, ValueError, MemoryError):
            tell(error="page", page=number)
            return
        tell(size=[bitmap.width, bitmap.height])
        target.write(memoryview(bitmap.buffer).cast("B"))
        target.flush()
        bitmap.close()
        page.close()


def drawn_size(size_pt: tuple[float, float], scale: float) -> tuple[int, int]:
    """(width, height) in pixels of a page of so many points at so many pixels per point."""
    return math.ceil(size_pt[0] * scale), math.ceil(size_pt[1] * scale)


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except (BrokenPipeError, json.JSONDecodeError):  # the caller is gone, or has seen enough
        sys.exit(1)
