"""The box that marks the region while a student trains: drawn when a sample is loaded, and faded out over the training.

Stored images are never changed. A student that always sees a box learns to depend on it, so `ShareSchedule` lowers the
share of samples with a box. `has_box` decides by item and epoch, so that a resumed run shows the same boxes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
from PIL import Image, ImageDraw

from qzoom.errors import ConfigError, DataError
from qzoom.images.load import load_image
from qzoom.settings import Share, settings
from qzoom.types import Box

Style = Literal["rectangle", "ellipse", "dim", "text", "none"]
STYLES: tuple[Style, ...] = get_args(Style)
MARGIN = 0.05
"""Share of the box's width and height that is added on every side."""

_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 220, 0),
    "blue": (0, 64, 255),
    "yellow": (255, 230, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 230, 255),
}
_LINE_OF_CELL = 1 / 6
_PLAIN_TOKENS = 1024
_DIMMED = 0.35


@settings
class ShareSchedule:
    """The share of samples that show a box, over the training."""

    first: Share = 1.0
    """Share at the beginning."""
    last: Share = 0.0
    """Share from `until` on."""
    shape: Literal["constant", "linear", "cosine"] = "linear"
    """How the share changes: "constant" keeps `first`, "linear" and "cosine" go to `last`."""
    until: Share = 1.0
    """Share of the training after which `last` is reached."""

    def share(self, progress: float) -> float:
        """Share of samples with a box. `progress`: share of the training that is done; values outside 0 to 1 count as
        the nearer end."""
        if self.shape == "constant":
            return self.first
        done = 1.0 if self.until <= 0 else min(1.0, max(0.0, progress) / self.until)
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.first + (self.last - self.first) * done


def has_box(item_id: str, epoch: int, share: float) -> bool:
    """Whether an item shows its box in an epoch; the same answer whenever it is asked.

    An item that shows its box at one share shows it at every higher share of the same epoch.
    """
    return _uniform(f"{item_id}/{epoch}/box") < share


def choose_style(item_id: str, epoch: int, styles: Mapping[str, float]) -> Style:
    """A style by weight, decided by item and epoch (ConfigError: an unknown style, or no positive weight)."""
    for style in styles:
        _check_style(style)
    total = sum(styles.values())
    if total <= 0 or min(styles.values()) < 0:
        raise ConfigError("styles need a weight above 0, and none below.")
    place = _uniform(f"{item_id}/{epoch}/style") * total
    for style, weight in styles.items():
        place -= weight
        if place < 0:
            return style  # type: ignore[return-value]
    return max(styles, key=lambda style: styles[style])  # type: ignore[arg-type]


def with_margin(box: Any, size_px: tuple[int, int], margin: float = MARGIN) -> Box:
    """The box with its margin on every side, in whole pixels and inside the picture.

    Args:
        box: x0, y0, x1, y1 in original pixels, half-open.
        margin: share of the box's own sides.

    Raises:
        DataError: not four finite numbers, an empty box, or one outside the picture.
    """
    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise DataError(f"A box holds four numbers (x0, y0, x1, y1), not {box!r}.") from error
    width, height = size_px
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise DataError(f"The box {tuple(box)!r} is empty; it needs x0 < x1 and y0 < y1.")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise DataError(f"The box {tuple(box)!r} lies outside the picture of {width} x {height} px.")
    across, down = margin * (x1 - x0), margin * (y1 - y0)
    return (
        max(0, math.floor(x0 - across)),
        max(0, math.floor(y0 - down)),
        min(width, math.ceil(x1 + across)),
        min(height, math.ceil(y1 + down)),
    )


def draw(
    image: Any, box: Any, style: Style = "rectangle", *, tokens: int | None = None, margin: float = MARGIN
) -> PIL.Image.Image:
    """A copy of the picture with the region marked.

    Lines run around the box with its margin, not through it; they are a sixth of a visual token wide, so that they
    survive the resizing, in the colour that differs most from what lies under them.

    Args:
        image: any picture source of `load_image`; palettes and EXIF orientation are taken care of.
        box: x0, y0, x1, y1 in original pixels, half-open, of the picture as a person sees it.
        style: "rectangle", "ellipse" (around the box), "dim" (everything else darker), "text" and "none" (unchanged).
        tokens: visual tokens of the view that it is drawn for; None takes 1,024.

    Returns:
        RGB, the size of the picture.

    Raises:
        DataError: a box that is empty or outside.
        ConfigError: an unknown style.
        ImageError: a picture that cannot be read.
    """
    _check_style(style)
    picture = load_image(image).image
    inner = with_margin(box, picture.size, margin)
    out = picture.copy()
    if style in ("none", "text"):
        return out
    if style == "dim":
        dark = Image.eval(picture, lambda value: round(value * _DIMMED))
        dark.paste(picture.crop(inner), inner[:2])
        return dark
    line = line_width_px(picture.size, tokens)
    outer = _around(inner, line, picture.size, style)
    colour = _COLOURS[_contrasting(picture, outer, line)]
    shape = (outer[0], outer[1], outer[2] - 1, outer[3] - 1)
    pen = ImageDraw.Draw(out)
    (pen.rectangle if style == "rectangle" else pen.ellipse)(shape, outline=colour, width=line)
    return out


def line_width_px(size_px: tuple[int, int], tokens: int | None = None) -> int:
    """Width of a drawn line in original pixels: a sixth of a visual token's side, at least 2."""
    cell = math.sqrt(size_px[0] * size_px[1] / (tokens or _PLAIN_TOKENS))
    return max(2, round(cell * _LINE_OF_CELL))


def clause(style: Style, box: Any, size_px: tuple[int, int], *, margin: float = MARGIN) -> str:
    """The sentence that a question gets with a style, "" where it gets none.

    Coordinates are thousandths of the picture's width and height (DataError: a box that is empty or outside;
    ConfigError: an unknown style).
    """
    _check_style(style)
    if style == "none":
        return ""
    if style == "text":
        x0, y0, x1, y1 = with_margin(box, size_px, margin)
        width, height = size_px
        near = (round(1000 * x0 / width), round(1000 * y0 / height))
        far = (round(1000 * x1 / width), round(1000 * y1 / height))
        return f"Look only at the region from {near} to {far}."
    return {
        "rectangle": "Look only at what is inside the drawn rectangle.",
        "ellipse": "Look only at what is inside the drawn ellipse.",
        "dim": "Look only at what is not darkened.",
    }[style]


def _around(inner: Box, line: int, size_px: tuple[int, int], style: Style) -> Box:
    """Outer edge of the line; a rectangle stays inside the picture, an ellipse passes through the box's corners."""
    x0, y0, x1, y1 = inner
    if style == "rectangle":
        return max(0, x0 - line), max(0, y0 - line), min(size_px[0], x1 + line), min(size_px[1], y1 + line)
    across, down = (x1 - x0) * (math.sqrt(2) - 1) / 2, (y1 - y0) * (math.sqrt(2) - 1) / 2
    return (
        math.floor(x0 - across) - line,
        math.floor(y0 - down) - line,
        math.ceil(x1 + across) + line,
        math.ceil(y1 + down) + line,
    )


def _contrasting(picture: PIL.Image.Image, outer: Box, line: int) -> str:
    """The colour whose distance to the pixels under the line is largest; of the nearest tenth, so that no part of
    the line vanishes."""
    under = _ring(picture, outer, line).astype(np.float32)
    best, name = -1.0, "red"
    for candidate, colour in _COLOURS.items():
        distance = float(np.quantile(_distance(under, np.array(colour, dtype=np.float32)), 0.1))
        if distance > best + 1e-3:
            best, name = distance, candidate
    return name


def _ring(picture: PIL.Image.Image, outer: Box, line: int) -> np.ndarray:
    """Pixels (n, 3) between the line's outer and inner edge, thinned out where there are very many."""
    x0, y0, x1, y1 = max(0, outer[0]), max(0, outer[1]), min(picture.width, outer[2]), min(picture.height, outer[3])
    strips = [
        (x0, y0, x1, min(y1, y0 + line)),
        (x0, max(y0, y1 - line), x1, y1),
        (x0, y0, min(x1, x0 + line), y1),
        (max(x0, x1 - line), y0, x1, y1),
    ]
    pixels = np.concatenate([np.asarray(picture.crop(strip)).reshape(-1, 3) for strip in strips])
    return pixels[:: max(1, len(pixels) // 20_000)]


def _distance(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How different colours look: Euclidean, the channels weighted by mean redness (the usual "redmean")."""
    red = (pixels[:, 0] + colour[0]) / 2
    gap = (pixels - colour) ** 2
    weights = (2 + red / 256) * gap[:, 0] + 4 * gap[:, 1] + (2 + (255 - red) / 256) * gap[:, 2]
    return np.asarray(np.sqrt(weights))


def _uniform(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ConfigError(f"Overlay style must be one of {', '.join(STYLES)}, not {style!r}.")
