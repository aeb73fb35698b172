"""A sheet to print on: draws text, remembers where every character went, then ages the sheet like a scan.

All renderers print through `Page`, so the character boxes that training and labelling rely on are made in one place.
The geometric changes (stretch, rotation) move picture and boxes together; noise comes afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from qzoom.data.synthetic.fonts import advances, load_font
from qzoom.data.synthetic.records import TextLine, TextSpan

__all__ = ["Page", "ScanStyle", "age", "span_box", "spans_boxes"]


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


def span_box(lines: list[TextLine] | tuple[TextLine, ...], span: TextSpan) -> tuple[int, int, int, int]:
    """The whole-pixel box around the characters of a span."""
    cells = lines[span.line].char_boxes_px[span.start : span.stop]
    return (
        max(0, math.floor(float(cells[:, 0].min()))),
        max(0, math.floor(float(cells[:, 1].min()))),
        math.ceil(float(cells[:, 2].max())),
        math.ceil(float(cells[:, 3].max())),
    )


def spans_boxes(
    lines: list[TextLine] | tuple[TextLine, ...], spans: tuple[TextSpan, ...]
) -> tuple[tuple[int, int, int, int], ...]:
    """One box for every span."""
    return tuple(span_box(lines, span) for span in spans)
