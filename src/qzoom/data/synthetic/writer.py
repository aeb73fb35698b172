"""A cursor that prints a document line by line: centred headings, label-and-value rows, columns, rules.

It keeps the page's margins, typeface and line pitch, so that the layouts above it only say what to print.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qzoom.data.synthetic.fonts import FontSet, font_paths, load_font
from qzoom.data.synthetic.page import Page
from qzoom.data.synthetic.records import TextSpan

__all__ = ["Writer", "bold_of"]

_BOLD = {
    "DejaVuSans.ttf": "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf": "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf": "DejaVuSerif-Bold.ttf",
    "DejaVuSans-Oblique.ttf": "DejaVuSans-Bold.ttf",
    "STIXGeneral.ttf": "STIXGeneralBol.ttf",
    "Roboto-Regular.ttf": "Roboto-Bold.ttf",
    "Roboto-Medium.ttf": "Roboto-Bold.ttf",
    "Roboto-Light.ttf": "Roboto-Medium.ttf",
    "SourceSansPro-Regular.ttf": "SourceSansPro-Bold.ttf",
    "SourceSansPro-Semibold.ttf": "SourceSansPro-Bold.ttf",
}


def bold_of(path: str) -> str:
    """The bold companion of a face, or the face itself."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{_BOLD[name]}" if name in _BOLD else path


class Writer:
    """Prints downwards on a page; `y` is the top of the next line in pixels."""

    def __init__(self, page: Page, rng: np.random.Generator, font_set: FontSet, size_px: int, margin_px: float) -> None:
        paths = font_paths(font_set)
        self.page, self.rng = page, rng
        self.size = size_px
        self.margin = margin_px
        self.width = page.image.size[0]
        self.font = paths[int(rng.integers(len(paths)))]
        self.pitch = float(rng.uniform(1.12, 1.5))
        self.ink = int(rng.integers(0, 80))
        self.y = 0.0

    @property
    def right(self) -> float:
        """The right edge of the printed area."""
        return self.width - self.margin

    def fits(self, text: str, size: int, room: float, font: str | None = None) -> int:
        """The largest size up to `size` at which the text is no wider than `room`, at least 10 px."""
        wide = load_font(font or self.font, size).getlength(text)
        return size if wide <= room else max(10, int(size * room / wide))

    def skip(self, lines: float = 1.0) -> None:
        """Leave some lines blank."""
        self.y += lines * self.size * self.pitch

    def text(
        self, text: str, *, align: str = "left", size: int | None = None, bold: bool = False, x: float | None = None
    ) -> int:
        """Print one line of its own and move down; returns the line's index. Too long lines shrink to the page."""
        font = bold_of(self.font) if bold else self.font
        fitted = self.fits(text, size or self.size, self.right - self.margin, font)
        at = x if x is not None else {"left": self.margin, "center": self.width / 2, "right": self.right}[align]
        line = self.page.print(at, self.y, text, font, fitted, fill=self.ink, align=align)
        self.y += max(fitted, 0.8 * self.size) * self.pitch
        return line

    def cells(
        self, cells: Sequence[tuple[float, str, str]], *, size: int | None = None, bold: bool = False, move: bool = True
    ) -> list[int]:
        """Print (position, align, text) cells in one row; positions are shares of the printed width."""
        font = bold_of(self.font) if bold else self.font
        wide = self.right - self.margin
        lines = [
            self.page.print(
                self.margin + share * wide, self.y, text, font, size or self.size, fill=self.ink, align=align
            )
            for share, align, text in cells
        ]
        if move:
            self.y += (size or self.size) * self.pitch
        return lines

    def labelled(self, label: str, value: str, style: str, *, size: int | None = None, bold: bool = False) -> TextSpan:
        """Print a label and its value: "inline" in one run, "tab" with the value at a tab stop, "right" with the value
        at the right edge, "below" on the next line. Returns the value's span."""
        font = bold_of(self.font) if bold else self.font
        size = self.fits(f"{label}  {value}", size or self.size, self.right - self.margin, font)
        if style == "inline":
            line = self.page.print(self.margin, self.y, f"{label} {value}", font, size, fill=self.ink)
            span = TextSpan(line, len(label) + 1, len(label) + 1 + len(value))
        elif style == "below":
            self.page.print(self.margin, self.y, label, font, size, fill=self.ink)
            self.y += size * self.pitch
            line = self.page.print(self.margin, self.y, value, font, size, fill=self.ink)
            span = TextSpan(line, 0, len(value))
        else:
            self.page.print(self.margin, self.y, label, font, size, fill=self.ink)
            if style == "right":
                line = self.page.print(self.right, self.y, value, font, size, fill=self.ink, align="right")
            else:
                after = self.margin + load_font(font, size).getlength(label + " ")
                at = max(after, self.margin + 0.3 * (self.right - self.margin))
                line = self.page.print(at, self.y, value, font, size, fill=self.ink)
            span = TextSpan(line, 0, len(value))
        self.y += size * self.pitch
        return span

    def rule(self, style: str) -> None:
        """A separator over the printed width: "dash", "equal", "star", "line" or "none"."""
        if style == "none":
            self.skip(0.4)
        elif style == "line":
            middle = self.y + 0.3 * self.size
            self.page.draw.line(
                [(self.margin, middle), (self.right, middle)], fill=self.ink, width=max(1, self.size // 12)
            )
            self.y += 0.6 * self.size
        else:
            char = {"dash": "-", "equal": "=", "star": "*"}[style]
            count = int((self.right - self.margin) / max(1.0, load_font(self.font, self.size).getlength(char)))
            self.page.print(self.margin, self.y, char * count, self.font, self.size, fill=self.ink)
            self.y += 0.8 * self.size * self.pitch
