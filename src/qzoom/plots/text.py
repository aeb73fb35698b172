"""Palette, sizes, fonts and text of all figures.

Sizes are pixels of the finished figure, which is drawn for dense displays (1800 px wide, read at about half that).
Text is cleaned, wrapped, cut with an ellipsis, and drawn with fallback fonts for characters that lack one. Nothing in a
text is markup; every character is drawn as it is or, when no installed font has it, as an empty box.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
from PIL import Image, ImageDraw, ImageFont

from qzoom.errors import QZoomError

Colour = tuple[int, int, int]

PAPER: Colour = (247, 247, 245)
CARD: Colour = (255, 255, 255)
INK: Colour = (24, 28, 36)
MUTED: Colour = (98, 105, 118)
HAIRLINE: Colour = (222, 224, 228)
TRACK: Colour = (233, 235, 239)
COARSE: Colour = (71, 98, 140)
ACCENTS: tuple[Colour, ...] = ((222, 84, 38), (24, 138, 118), (128, 78, 196), (196, 138, 12))
HEAT: tuple[Colour, ...] = ((255, 214, 102), (255, 150, 46), (224, 58, 62))  # low, middle, high

FIGURE_WIDTH_PX = 1800
MARGIN_PX = 64
GAP_PX = 52
RADIUS_PX = 14

_FILES = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}


@lru_cache(maxsize=1)
def font_folder() -> Path:
    """The folder of the fonts that come with matplotlib, found without importing it (QZoomError: matplotlib is not
    installed)."""
    spec = find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise QZoomError("Figures need matplotlib's fonts and matplotlib is missing; install it with pip.")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=64)
def font(size_px: int, weight: str = "regular") -> ImageFont.FreeTypeFont:
    """The typeface at a size."""
    return ImageFont.truetype(str(font_folder() / _FILES[weight]), size_px)


_MAX_CHARS = 4000  # more than any figure shows
_FIRST_RARE = "\u0530"  # below it the main typeface has every letter
_FALLBACKS = (
    *("NotoSansCJK", "NotoSansSC", "SourceHanSans", "wqy", "DroidSansFallback", "msyh", "PingFang"),
    *("Arial Unicode", "NotoSans", "unifont"),
)
_LOCK = threading.Lock()


def clean(text: str) -> str:
    """Printable text: control characters become spaces, halves of surrogate pairs a replacement mark."""
    out = []
    for char in text[:_MAX_CHARS]:
        kind = unicodedata.category(char)
        if kind == "Cs":
            out.append("\ufffd")
        elif char == "\n":
            out.append(char)
        elif kind in ("Cc", "Zl", "Zp", "Zs"):
            out.append(" ")
        elif kind != "Cf" or char in "\u200c\u200d":
            out.append(char)
    return "".join(out).strip() + ("…" if len(text) > _MAX_CHARS else "")


def text_width(text: str, size_px: int, weight: str = "regular") -> float:
    """Width of one line in pixels."""
    return sum(face.getlength(part) for part, face in _runs(text, size_px, weight))


def wrap(text: str, width_px: float, size_px: int, weight: str = "regular", max_lines: int = 3) -> list[str]:
    """Lines no wider than `width_px`; what does not fit into `max_lines` ends in an ellipsis.

    Breaks fall between words; a word longer than a line is broken inside.
    """
    lines: list[str] = []
    for part in clean(text).split("\n"):
        line = ""
        for word in part.split():
            trial = f"{line} {word}" if line else word
            if text_width(trial, size_px, weight) <= width_px:
                line = trial
                continue
            if line:
                lines.append(line)
            while text_width(word, size_px, weight) > width_px and len(word) > 1 and len(lines) <= max_lines:
                count = _fitting(word, width_px, size_px, weight)
                lines.append(word[:count])
                word = word[count:]
            line = word
            if len(lines) > max_lines:
                break
        if line:
            lines.append(line)
        if len(lines) > max_lines:
            break
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        last = lines[-1]
        while last and text_width(last + "…", size_px, weight) > width_px:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines or [""]


def _fitting(word: str, width_px: float, size_px: int, weight: str) -> int:
    """The most characters of a word that fit, at least 1."""
    low, high = 1, len(word)
    while low < high:
        middle = (low + high + 1) // 2
        if text_width(word[:middle], size_px, weight) <= width_px:
            low = middle
        else:
            high = middle - 1
    return low


def draw_text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size_px: int,
    colour: Colour = INK,
    *,
    weight: str = "regular",
    anchor: str = "l",
) -> None:
    """One line of text. `at`: x of the anchor and y of the top of the line's em box. `anchor`: "l", "m" or "r": whether
    x is the left end, the middle or the right end."""
    line = clean(text).replace("\n", " ")
    x = at[0]
    if anchor != "l":
        x -= text_width(line, size_px, weight) * (1.0 if anchor == "r" else 0.5)
    baseline = at[1] + round(size_px * 0.86)
    for part, face in _runs(line, size_px, weight):
        draw.text((x, baseline), part, font=face, fill=colour, anchor="ls")
        x += face.getlength(part)


def paragraph(
    text: str, width_px: int, size_px: int, colour: Colour = INK, *, weight: str = "regular", max_lines: int = 3
) -> PIL.Image.Image:
    """Wrapped text as a transparent picture of exactly `width_px`, as high as its lines."""
    lines = wrap(text, width_px, size_px, weight, max_lines)
    leading = round(size_px * 1.32)
    out = Image.new("RGBA", (width_px, leading * (len(lines) - 1) + round(size_px * 1.16)), (*colour, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        draw_text(draw, (0, i * leading), line, size_px, colour, weight=weight)
    return out


def _runs(text: str, size_px: int, weight: str) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Stretches of text that share a font."""
    main = font(size_px, weight)
    if all(char < _FIRST_RARE for char in text):
        if text:
            yield text, main
        return
    part, face = "", main
    for char in text:
        path = _fallback_for(char)
        wanted = main if path is None else _face(path, size_px)
        if wanted is not face and part:
            yield part, face
            part = ""
        part, face = part + char, wanted
    if part:
        yield part, face


@lru_cache(maxsize=64)
def _face(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size_px)


@lru_cache(maxsize=4096)
def _fallback_for(char: str) -> str | None:
    """The font file to draw a character with; None for the main typeface, also when nothing has it."""
    if char < _FIRST_RARE or ord(char) in _characters(str(font_folder() / "DejaVuSans.ttf")):
        return None
    return next((path for path in _fallback_files() if ord(char) in _characters(path)), None)


@lru_cache(maxsize=1)
def _fallback_files() -> tuple[str, ...]:
    """Fonts with wide coverage, those of this system in order of preference, then matplotlib's symbols."""
    from matplotlib import font_manager

    with _LOCK:
        installed = sorted(entry.fname for entry in font_manager.fontManager.ttflist)
    chosen = [path for name in _FALLBACKS for path in installed if Path(path).name.lower().startswith(name.lower())]
    return (*dict.fromkeys(chosen), str(font_folder() / "STIXGeneral.ttf"))


@lru_cache(maxsize=32)
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file has; none for a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
