"""The image with a soft heat map and box outlines, which do not hide the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import Image, ImageDraw

from qzoom.images.geometry import scale_box
from qzoom.plots.text import ACCENTS, HEAT, Colour, font
from qzoom.types import Box

_SMOOTH = 4  # corners are drawn at this multiple and shrunk
_FAINTEST_PEAK = 0.02  # a map without any higher value is noise and is not drawn


def heat_overlay(page: PIL.Image.Image, values: np.ndarray, strength: float = 0.62) -> PIL.Image.Image:
    """A page tinted by a map over its cells, relative to the map's highest value.

    Bright paper is tinted by multiplication, so that print keeps its contrast; dark pictures are blended.

    Args:
        page: RGB, at the size in which it is shown.
        values: (rows, columns) in [0, 1].
        strength: tint at the highest value, in [0, 1].

    Returns:
        A new RGB picture; a plain copy when the map is empty or nowhere above 0.02.
    """
    values = np.nan_to_num(np.asarray(values, np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    if values.ndim != 2 or values.size == 0 or float(values.max()) <= _FAINTEST_PEAK:
        return page.copy()
    relative = np.clip(values / values.max(), 0, 1)
    smooth = Image.fromarray(relative).resize(page.size, Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0, 1)
    ramp = np.clip((heat - 0.08) / 0.92, 0, 1)
    alpha = (strength * ramp * ramp * (3 - 2 * ramp))[:, :, None]
    stops = np.linspace(0, 1, len(HEAT))
    tint = np.stack([np.interp(heat, stops, [c[i] for c in HEAT]) for i in range(3)], axis=2).astype(np.float32)
    pixels = np.asarray(page, np.float32)
    grey = page.convert("L").resize((max(1, page.width // 32), max(1, page.height // 32)), Image.Resampling.BOX)
    light = np.asarray(grey.resize(page.size, Image.Resampling.BILINEAR), np.float32)[:, :, None] / 255
    light = np.clip((light - 0.3) / 0.4, 0, 1)
    tinted = light * pixels * tint / 255 + (1 - light) * (0.5 * pixels + 0.5 * tint)
    return Image.fromarray((pixels + alpha * (tinted - pixels) + 0.5).clip(0, 255).astype(np.uint8))


def draw_boxes(
    page: PIL.Image.Image, boxes: Sequence[Box], size_px: tuple[int, int], *, numbered: bool
) -> tuple[PIL.Image.Image, list[Box]]:
    """Outline boxes on a shown page.

    Args:
        page: RGB, at the size in which it is shown.
        boxes: xyxy in original pixels.
        size_px: (width, height) in original pixels.
        numbered: badge every box with its number, from 1.
    """
    out = page.copy()
    shown = [_at_least(scale_box(box, size_px, page.size), 12, page.size) for box in boxes]
    for i, box in reversed(list(enumerate(shown))):
        colour = ACCENTS[i % len(ACCENTS)]
        left, top, right, bottom = box
        _frame(out, (left - 7, top - 7, right + 7, bottom + 7), (255, 255, 255), 7)
        _frame(out, (left - 6, top - 6, right + 6, bottom + 6), colour, 4)
    for i, (left, top, _, _) in reversed(list(enumerate(shown)) if numbered else []):
        _badge(out, (left, top), str(i + 1), ACCENTS[i % len(ACCENTS)])
    return out, shown


def _at_least(box: Box, side_px: int, size_px: tuple[int, int]) -> Box:
    """A box of at least `side_px` a side, so that its outline is seen on a strongly shrunk page."""
    out = []
    for axis in (0, 1):
        low, high = box[axis], box[axis + 2]
        if high - low < side_px:
            low = max(0, min((low + high - side_px) // 2, size_px[axis] - side_px))
            high = min(low + side_px, max(size_px[axis], 1))
        out.append((low, high))
    return out[0][0], out[1][0], out[0][1], out[1][1]


def _frame(image: PIL.Image.Image, box: Box, colour: Colour, width_px: int) -> None:
    x0, y0, x1, y1 = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))
    radius = min(8, (x1 - x0) // 2, (y1 - y0) // 2)
    ImageDraw.Draw(image).rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius, outline=colour, width=width_px)


def _badge(image: PIL.Image.Image, corner: tuple[int, int], text: str, colour: Colour) -> None:
    side = 34
    x, y = (
        max(0, min(corner[0] - side // 2, image.width - side)),
        max(0, min(corner[1] - side // 2, image.height - side)),
    )
    disc = Image.new("L", (side * _SMOOTH,) * 2)
    ImageDraw.Draw(disc).ellipse((0, 0, side * _SMOOTH - 1, side * _SMOOTH - 1), fill=255)
    image.paste(colour, (x, y, x + side, y + side), disc.resize((side, side), Image.Resampling.LANCZOS))
    ImageDraw.Draw(image).text((x + side / 2, y + side / 2), text, (255, 255, 255), font(20, "bold"), "mm")


def rounded(image: PIL.Image.Image, radius_px: int, border: Colour | None = None, width_px: int = 2) -> PIL.Image.Image:
    """A picture with round corners (RGBA), with a border if a colour is given."""
    size = (image.width * 2, image.height * 2)
    radius = min(radius_px, image.width // 2, image.height // 2) * 2
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, fill=255)
    out = image.convert("RGBA")
    if border is not None:
        line = Image.new("L", size)
        ImageDraw.Draw(line).rounded_rectangle(
            (0, 0, size[0] - 1, size[1] - 1), radius, outline=255, width=width_px * 2
        )
        out.paste((*border, 255), (0, 0, *image.size), line.resize(image.size, Image.Resampling.BOX))
    out.putalpha(mask.resize(image.size, Image.Resampling.BOX))
    return out
