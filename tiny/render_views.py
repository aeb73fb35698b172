"""Views of a page: a resized (and slightly turned, blurred, faded) whole or crop, with its text mapped into it.

A page is in its own pixels; the model sees views of a few dozen or hundred visual tokens. Everything that training
knows about where text is printed passes through here. Geometry: `fit_to_tokens` chooses the token grid of a view,
`crop_around` and `snippet_box` choose where to look, `View` cuts. `patchify` gives the numbers that transformers'
image processor would give (a test holds them equal).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from tiny.model import PATCH_PX, TOKEN_PX

Box = tuple[float, float, float, float]


def patchify(picture: np.ndarray) -> np.ndarray:
    """Patches of one picture: (h, w, 3) uint8, sides multiples of 32 -> (h/16 * w/16, 768) float32, of one frame (the
    stock model sees every picture twice; `model.LinearPatchEmbedding` adds the two halves of its weights instead)."""
    height, width, _ = picture.shape
    merge = TOKEN_PX // PATCH_PX
    blocks = picture.reshape(height // TOKEN_PX, merge, PATCH_PX, width // TOKEN_PX, merge, PATCH_PX, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5).astype(np.float32)
    ordered *= np.float32(2.0 / 255.0)
    ordered -= np.float32(1.0)
    return ordered.reshape(-1, 3 * PATCH_PX * PATCH_PX)


def fit_to_tokens(width_px: float, height_px: float, max_tokens: int, min_tokens: int = 1) -> tuple[int, int]:
    """Tokens across and down, (w, h), for a picture shown at no more than `max_tokens`, aspect kept as well as
    whole tokens allow; pictures below `min_tokens` are enlarged."""
    w = max(1, round(width_px / TOKEN_PX))
    h = max(1, round(height_px / TOKEN_PX))
    if w * h > max_tokens:
        scale = math.sqrt(width_px * height_px / (max_tokens * TOKEN_PX * TOKEN_PX))
        w = max(1, math.floor(width_px / scale / TOKEN_PX))
        h = max(1, math.floor(height_px / scale / TOKEN_PX))
    elif w * h < min_tokens:
        scale = math.sqrt(min_tokens * TOKEN_PX * TOKEN_PX / (width_px * height_px))
        w = math.ceil(width_px * scale / TOKEN_PX)
        h = math.ceil(height_px * scale / TOKEN_PX)
    if w * h > max_tokens:
        w, h = (min(w, max_tokens), 1) if h == 1 else (1, min(h, max_tokens)) if w == 1 else (w, max_tokens // w)
    return w, max(1, h)


@dataclass(frozen=True, slots=True)
class Look:
    """How a view differs from a clean copy: turn in degrees (counter-clockwise), blur radius in pixels, JPEG quality
    (0 for none), contrast and brightness (grey levels), noise (grey levels), and `fade`, the share of ink lost."""

    angle_deg: float = 0.0
    blur_px: float = 0.0
    jpeg: int = 0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.0
    fade: float = 0.0


def random_look(rng: np.random.Generator, *, turn: bool = True) -> Look:
    """A look of a scan or a photograph; four in ten are clean but for contrast and brightness."""
    contrast, brightness = float(rng.uniform(0.7, 1.2)), float(rng.uniform(-25, 15))
    if rng.random() < 0.4:
        return Look(contrast=contrast, brightness=brightness)
    return Look(
        angle_deg=float(rng.uniform(-3, 3)) if turn and rng.random() < 0.4 else 0.0,
        blur_px=float(rng.uniform(0.3, 1.0)) if rng.random() < 0.3 else 0.0,
        jpeg=int(rng.integers(25, 90)) if rng.random() < 0.3 else 0,
        contrast=contrast,
        brightness=brightness,
        noise=float(rng.uniform(2, 14)) if rng.random() < 0.3 else 0.0,
        fade=float(rng.uniform(0.1, 0.55)) if rng.random() < 0.3 else 0.0,
    )


class View:
    """The part `box` (x0, y0, x1, y1, page pixels, may reach outside) of a page at `tokens_wh` tokens; `pixels` is
    uint8 RGB (h * 32, w * 32, 3)."""

    def __init__(
        self,
        page: np.ndarray,
        box: Box | None,
        tokens_wh: tuple[int, int],
        look: Look | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        box = box if box is not None else (0.0, 0.0, float(page.shape[1]), float(page.shape[0]))
        self.size_wh = (tokens_wh[0] * TOKEN_PX, tokens_wh[1] * TOKEN_PX)
        look = look or Look()
        self._middle = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2], dtype=np.float32)
        self.scale = np.array(
            [self.size_wh[0] / (box[2] - box[0]), self.size_wh[1] / (box[3] - box[1])], dtype=np.float32
        )
        turn = math.radians(look.angle_deg)
        self._turn = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=np.float32)
        image = _cut(page, box, self.size_wh, look.angle_deg)
        self.pixels = np.ascontiguousarray(_as_rgb(_degrade(image, look, rng)))

    def place(self, points_px: np.ndarray) -> np.ndarray:
        """Page points (n, 2) in view pixels, also those outside."""
        moved = (points_px - self._middle) * self.scale
        return moved @ self._turn.T + np.array(self.size_wh, dtype=np.float32) / 2

    def place_inside(self, points_px: np.ndarray) -> np.ndarray:
        """Page points (n, 2) in view pixels; NaN where they fall outside the view."""
        moved = self.place(points_px)
        moved[((moved < 0) | (moved >= np.array(self.size_wh))).any(axis=1)] = np.nan
        return moved


def _cut(page: np.ndarray, box: Box, size_wh: tuple[int, int], angle_deg: float) -> Image.Image:
    """The resized part; what lies outside the page repeats its edge."""
    width, height = size_wh
    pad = 0
    if angle_deg:
        pad = math.ceil(max(size_wh) * math.sin(math.radians(abs(angle_deg))) / 2) + 1
    step_x, step_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    box = (box[0] - pad * step_x, box[1] - pad * step_y, box[2] + pad * step_x, box[3] + pad * step_y)
    x0, y0, x1, y1 = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
    inside = page[max(0, y0) : max(1, y1), max(0, x0) : max(1, x1)]
    if x0 < 0 or y0 < 0 or x1 > page.shape[1] or y1 > page.shape[0]:
        margins = [
            (min(max(0, -y0), y1 - y0), min(max(0, y1 - page.shape[0]), y1 - y0)),
            (min(max(0, -x0), x1 - x0), min(max(0, x1 - page.shape[1]), x1 - x0)),
            (0, 0),
        ]
        inside = np.pad(inside, margins[: page.ndim], mode="edge")
    image = Image.fromarray(np.ascontiguousarray(inside))
    part = (
        max(0.0, box[0] - x0),
        max(0.0, box[1] - y0),
        min(float(image.size[0]), box[2] - x0),
        min(float(image.size[1]), box[3] - y0),
    )
    image = image.resize((width + 2 * pad, height + 2 * pad), Image.Resampling.BICUBIC, box=part)
    if pad:
        image = image.rotate(angle_deg, Image.Resampling.BILINEAR).crop((pad, pad, pad + width, pad + height))
    return image


def _degrade(image: Image.Image, look: Look, rng: np.random.Generator | None) -> np.ndarray:
    if look.blur_px:
        image = image.filter(ImageFilter.GaussianBlur(look.blur_px))
    if look.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=look.jpeg)
        image = Image.open(buffer)
    pixels = np.asarray(image)
    if look.contrast == 1.0 and not look.brightness and not look.fade and not look.noise:
        return pixels
    level = np.arange(256, dtype=np.float32)
    level = (level - 128) * look.contrast + 128 + look.brightness
    level = 255 - (255 - level) * (1 - look.fade)
    if look.noise and rng is not None:
        grain = rng.standard_normal(pixels.shape[:2], dtype=np.float32) * np.float32(look.noise)
        return np.clip(level[pixels] + (grain if pixels.ndim == 2 else grain[..., None]), 0, 255).astype(np.uint8)
    return np.clip(level, 0, 255).astype(np.uint8)[pixels]


def _as_rgb(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def crop_around(
    target: tuple[int, int, int, int], size_wh: tuple[int, int], rng: np.random.Generator, cell_px: float
) -> Box:
    """A region box around `target` in a picture of `size_wh`: margins from none to several coarse cells of `cell_px`
    (the region branch's boxes hold several rows), now and then up to a quarter of the page, now and then cutting into
    the target."""
    width, height = size_wh
    kind = rng.random()
    if kind < 0.75:
        margins = rng.uniform(0.0, 2.2 if kind < 0.4 else 3.6, 4) * cell_px
    elif kind < 0.93:
        margins = rng.uniform(0.0, 0.25, 4) * np.array([width, height, width, height])
    else:
        margins = rng.uniform(-0.5, 1.0, 4) * cell_px
    box = (target[0] - margins[0], target[1] - margins[1], target[2] + margins[2], target[3] + margins[3])
    if rng.random() < 0.7:
        box = tuple((math.floor if i < 2 else math.ceil)(edge / cell_px) * cell_px for i, edge in enumerate(box))
    x0, y0, x1, y1 = max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])
    least = min(max(28.0, cell_px), float(width), float(height))
    if x1 - x0 < least:
        x0 = min(max(0.0, (x0 + x1 - least) / 2), width - least)
        x1 = x0 + least
    if y1 - y0 < least:
        y0 = min(max(0.0, (y0 + y1 - least) / 2), height - least)
        y1 = y0 + least
    return (float(round(x0)), float(round(y0)), float(round(x1)), float(round(y1)))


def region_tokens(box: Box, rng: np.random.Generator, max_tokens: int = 144) -> tuple[int, int]:
    """Tokens (w, h) of a region crop: enlarged to 32 to 80 tokens when small, never above `max_tokens`."""
    least = int(rng.integers(32, 81))
    return fit_to_tokens(round(box[2] - box[0]), round(box[3] - box[1]), max_tokens, min(least, max_tokens))


def snippet_box(
    target: tuple[int, int, int, int],
    size_wh: tuple[int, int],
    text_px: float,
    tokens_wh: tuple[int, int],
    rng: np.random.Generator,
) -> Box:
    """A box that shows `target` at `tokens_wh` tokens with its text `text_px` high, the target anywhere inside it (the
    box may be enlarged so that the target fits, and is kept inside the picture)."""
    width, height = size_wh
    scale = text_px / max(1.0, target[3] - target[1])
    wide = max(tokens_wh[0] * TOKEN_PX / scale, (target[2] - target[0]) * 1.05 + 4)
    high = max(tokens_wh[1] * TOKEN_PX / scale, (target[3] - target[1]) * 1.1 + 4)
    grow = max(wide * scale / (tokens_wh[0] * TOKEN_PX), high * scale / (tokens_wh[1] * TOKEN_PX))
    wide, high = tokens_wh[0] * TOKEN_PX / scale * grow, tokens_wh[1] * TOKEN_PX / scale * grow
    shrink = min(1.0, width / wide, height / high)
    wide, high = wide * shrink, high * shrink
    x0 = _between(target[2] - wide, min(float(target[0]), width - wide), rng)
    y0 = _between(target[3] - high, min(float(target[1]), height - high), rng)
    x0, y0 = max(0.0, min(x0, width - wide)), max(0.0, min(y0, height - high))
    return (x0, y0, min(x0 + wide, float(width)), min(y0 + high, float(height)))


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    """A number between `low` (at least 0) and `high`; where the range is empty, its lower end."""
    low = max(0.0, low)
    return float(low + rng.random() * max(0.0, high - low))
