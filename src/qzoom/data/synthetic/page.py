"""Drawn pictures: their records, typefaces, a sheet to print on, and a cursor that prints line by line.

Coordinates are original pixels, xyxy, half-open. `Page` records the box of every character, which follows stretch and
rotation. The `core` typefaces come with matplotlib, so that anyone can remake every held-out picture; `train` adds
Roboto and Source Sans where their packages are installed (extra `train`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from qzoom.data.samples import SampleQuestion
from qzoom.types import Box

TRAIN_SEEDS = range(0, 2**31)
"""Seeds that training may draw from."""

HELD_OUT_SEEDS = range(2**31, 2**31 + 1_000_000)
"""Seeds of pictures that no training run may see; evaluation draws from these."""


@dataclass(frozen=True, slots=True, eq=False)
class TextLine:
    """One printed run of text.

    `char_boxes_px` has shape (len(text), 4), float32: the cell of every character, as wide as its advance and as high
    as the line's ink.
    """

    text: str
    char_boxes_px: np.ndarray


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Characters `start` to `stop` (half-open) of line number `line` of a sample."""

    line: int
    start: int
    stop: int


_NOWHERE = TextSpan(0, 0, 0)


@dataclass(frozen=True, slots=True)
class SyntheticQuestion(SampleQuestion):
    """A question about a drawn picture; `boxes` are all places that hold the answer."""

    # the printed characters that spell the answer, in order, when it is printed as it stands; else empty
    spans: tuple[TextSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class SceneObject:
    """A drawn object: names of its colour and shape, its box (xyxy, pixels, its tag included), the code on its tag with
    the code's characters, and its middle in pixels from the left."""

    colour: str
    shape: str
    box: Box
    code: str = ""
    span: TextSpan = _NOWHERE
    middle_px: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticSample:
    """A rendered picture (RGB) with its printed lines and its questions; `kind` names the renderer's variety. `objects`
    are a scene's objects."""

    image: Image.Image
    questions: tuple[SyntheticQuestion, ...]
    kind: str
    seed: int
    lines: tuple[TextLine, ...] = ()
    objects: tuple[SceneObject, ...] = ()


FontSet = Literal["core", "train"] | tuple[str, ...]
"""A named set of typefaces, or the paths of the faces to use."""

_CORE = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    *("DejaVuSans-Oblique.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmss10.ttf", "cmtt10.ttf"),
)
_EXTRA = {
    "font_roboto": ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf", "Roboto-Light.ttf"),
    "font_source_sans_pro": ("SourceSansPro-Regular.ttf", "SourceSansPro-Semibold.ttf", "SourceSansPro-Bold.ttf"),
}


@lru_cache(maxsize=4)
def font_paths(font_set: FontSet = "core") -> tuple[str, ...]:
    """Paths of the typefaces of a set, in a fixed order; the `train` set holds only what is installed."""
    if isinstance(font_set, tuple):
        return font_set
    import matplotlib

    base = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = [base / name for name in _CORE]
    if font_set == "train":
        for package, names in _EXTRA.items():
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                paths += [Path(spec.origin).parent / "files" / name for name in names]
    return tuple(str(path) for path in paths if path.is_file())


@lru_cache(maxsize=2048)
def load_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    """The face at an em size in pixels, loaded once; basic layout, so that advances do not depend on the machine."""
    return ImageFont.truetype(path, size_px, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=200_000)
def _advance(path: str, size_px: int, char: str) -> float:
    return float(load_font(path, size_px).getlength(char))


def advances(path: str, size_px: int, text: str) -> np.ndarray:
    """Advance widths of the characters of `text` in pixels, float32, kerning left aside."""
    return np.array([_advance(path, size_px, char) for char in text], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class ScanStyle:
    """How a sheet is aged: rotation in degrees, blur radius in pixels, noise and streaks in grey levels (0 to 255),
    `fade` the share of contrast lost, `erosion` the share of pixels where ink is missing."""

    angle_deg: float = 0.0
    blur_px: float = 0.0
    noise: float = 0.0
    shade: float = 0.0
    fade: float = 0.0
    erosion: float = 0.0


class Page:
    """A picture under construction; `lines` grows with every printed text."""

    def __init__(self, width_px: int, height_px: int, background: int | tuple[int, int, int] = 255) -> None:
        mode = "L" if isinstance(background, int) else "RGB"
        self.image = Image.new(mode, (width_px, height_px), background)
        self.draw = ImageDraw.Draw(self.image)
        self.lines: list[TextLine] = []

    def print(
        self,
        x_px: float,
        y_px: float,
        text: str,
        font_path: str,
        size_px: int,
        *,
        fill: int | tuple[int, int, int] = 0,
        align: str = "left",
        spread: float = 1.0,
    ) -> int:
        """Print `text` with its top left (or top right, or top centre) at x, y; returns the index of its line.

        `spread` > 1 letter-spaces the text, character by character.
        """
        font = load_font(font_path, size_px)
        steps = advances(font_path, size_px, text) * spread
        edges = np.concatenate([[0.0], np.cumsum(steps)])
        total = float(edges[-1])
        left = x_px - {"left": 0.0, "right": total, "center": total / 2}[align]
        if spread == 1.0:
            self.draw.text((left, y_px), text, font=font, fill=fill)
        else:
            for char, edge in zip(text, edges[:-1], strict=True):
                self.draw.text((left + float(edge), y_px), char, font=font, fill=fill)
        top, bottom = _ink_rows(font_path, size_px, text)
        boxes = np.empty((len(text), 4), dtype=np.float32)
        boxes[:, 0] = left + edges[:-1]
        boxes[:, 2] = left + edges[1:]
        boxes[:, 1] = y_px + top
        boxes[:, 3] = y_px + bottom
        self.lines.append(TextLine(text, boxes))
        return len(self.lines) - 1

    def transform(
        self, scale_x: float, scale_y: float, angle_deg: float, background: int | tuple[int, int, int]
    ) -> None:
        """Stretch the sheet and turn it about its centre (counter-clockwise); character boxes follow."""
        width, height = self.image.size
        new_width, new_height = max(1, round(width * scale_x)), max(1, round(height * scale_y))
        if (new_width, new_height) != (width, height):
            self.image = self.image.resize((new_width, new_height), Image.Resampling.BILINEAR)
        if angle_deg:
            flat = self.image.mode == "RGB" and isinstance(background, int)
            fill: int | tuple[int, ...] = (background,) * 3 if flat else background  # type: ignore[assignment]
            self.image = self.image.rotate(angle_deg, Image.Resampling.BILINEAR, fillcolor=fill)
        self.draw = ImageDraw.Draw(self.image)
        factors = (new_width / width, new_height / height)
        self.lines = [_moved(line, factors, angle_deg, (new_width / 2, new_height / 2)) for line in self.lines]


def _ink_rows(font_path: str, size_px: int, text: str) -> tuple[float, float]:
    """First and last ink row of a text relative to its drawing origin."""
    if not text.strip():
        return 0.0, float(size_px)
    box = load_font(font_path, size_px).getbbox(text)
    return float(box[1]), float(box[3])


def _moved(line: TextLine, factors: tuple[float, float], angle_deg: float, centre: tuple[float, float]) -> TextLine:
    boxes = line.char_boxes_px * np.array([factors[0], factors[1], factors[0], factors[1]], dtype=np.float32)
    if not angle_deg:
        return TextLine(line.text, boxes)
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    mid_x = (boxes[:, 0] + boxes[:, 2]) / 2 - centre[0]
    mid_y = (boxes[:, 1] + boxes[:, 3]) / 2 - centre[1]
    half_x = (boxes[:, 2] - boxes[:, 0]) / 2
    half_y = (boxes[:, 3] - boxes[:, 1]) / 2
    new_x = mid_x * cos + mid_y * sin + centre[0]
    new_y = -mid_x * sin + mid_y * cos + centre[1]
    wide = half_x * abs(cos) + half_y * abs(sin)
    high = half_x * abs(sin) + half_y * abs(cos)
    turned = np.stack([new_x - wide, new_y - high, new_x + wide, new_y + high], axis=1).astype(np.float32)
    return TextLine(line.text, turned)


def age(image: Image.Image, style: ScanStyle, rng: np.random.Generator) -> Image.Image:
    """The picture as a scanner or a tired thermal printer would give it; same mode and size."""
    if style.blur_px > 0:
        image = image.filter(ImageFilter.GaussianBlur(style.blur_px))
    if style.fade:
        image = image.point(
            [round(255 - (255 - level) * (1 - style.fade)) for level in range(256)] * len(image.getbands())
        )
    if not (style.noise or style.shade or style.erosion):
        return image
    pixels = np.asarray(image).astype(np.int16)
    height, width = pixels.shape[:2]
    plane = _tiled(rng.standard_normal((_TILE, _TILE), dtype=np.float32) * np.float32(style.noise), height, width)
    if style.erosion:
        worn = (rng.random((_TILE // 2, _TILE // 2), dtype=np.float32) < style.erosion) * np.float32(120.0)
        plane += _tiled(np.repeat(np.repeat(worn, 2, axis=0), 2, axis=1), height, width)
    if style.shade:
        plane += _shade(height, width, style.shade, rng)
    pixels += plane if pixels.ndim == 2 else plane[:, :, None]
    np.clip(pixels, 0, 255, out=pixels)
    return Image.fromarray(pixels.astype(np.uint8))


_TILE = 256


def _tiled(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """A square tile repeated over (height, width), rounded to int16: one tile of noise is enough for a sheet."""
    whole = tile.astype(np.int16)
    return np.tile(whole, (height // _TILE + 1, width // _TILE + 1))[:height, :width]


def _shade(height: int, width: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth darkening over the sheet, (height, width) int16, at most about `strength` grey levels."""
    coarse = Image.fromarray((rng.random((4, 3), dtype=np.float32) * np.float32(strength)).astype(np.uint8))
    return -np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)


def span_box(lines: Sequence[TextLine], span: TextSpan) -> Box:
    """The whole-pixel box around the characters of a span."""
    cells = lines[span.line].char_boxes_px[span.start : span.stop]
    return (
        max(0, math.floor(float(cells[:, 0].min()))),
        max(0, math.floor(float(cells[:, 1].min()))),
        math.ceil(float(cells[:, 2].max())),
        math.ceil(float(cells[:, 3].max())),
    )


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
        self, cells: Sequence[tuple[float, str, str]], *, size: int | None = None, bold: bool = False
    ) -> list[int]:
        """Print (position, align, text) cells in one row; positions are shares of the printed width."""
        font = bold_of(self.font) if bold else self.font
        wide = self.right - self.margin
        size = size or self.size
        lines = [
            self.page.print(self.margin + share * wide, self.y, text, font, size, fill=self.ink, align=align)
            for share, align, text in cells
        ]
        self.y += size * self.pitch
        return lines

    def labelled(self, label: str, value: str, style: str, *, size: int | None = None, bold: bool = False) -> TextSpan:
        """Print a label and its value: "inline" in one run, "tab" with the value at a tab stop, "right" with the value
        at the right edge, "below" on the next line. Returns the value's span."""
        font = bold_of(self.font) if bold else self.font
        size = self.fits(f"{label}  {value}", size or self.size, self.right - self.margin, font)
        if style == "inline":
            line = self.page.print(self.margin, self.y, f"{label} {value}", font, size, fill=self.ink)
            self.y += size * self.pitch
            return TextSpan(line, len(label) + 1, len(label) + 1 + len(value))
        self.page.print(self.margin, self.y, label, font, size, fill=self.ink)
        at, align = self.margin, "left"
        if style == "below":
            self.y += size * self.pitch
        elif style == "right":
            at, align = self.right, "right"
        else:
            after = self.margin + load_font(font, size).getlength(label + " ")
            at = max(after, self.margin + 0.3 * (self.right - self.margin))
        line = self.page.print(at, self.y, value, font, size, fill=self.ink, align=align)
        self.y += size * self.pitch
        return TextSpan(line, 0, len(value))

    def rule(self, style: str) -> None:
        """A separator over the printed width: "dash", "equal", "star", "line" or "none"."""
        if style == "none":
            self.skip(0.4)
        elif style == "line":
            middle = self.y + 0.3 * self.size
            ends = [(self.margin, middle), (self.right, middle)]
            self.page.draw.line(ends, fill=self.ink, width=max(1, self.size // 12))
            self.y += 0.6 * self.size
        else:
            char = {"dash": "-", "equal": "=", "star": "*"}[style]
            count = int((self.right - self.margin) / max(1.0, load_font(self.font, self.size).getlength(char)))
            self.page.print(self.margin, self.y, char * count, self.font, self.size, fill=self.ink)
            self.y += 0.8 * self.size * self.pitch
