"""Pictures to vision-tower input, in bulk: the same numbers in the same order as transformers' image processor.

Training feeds pictures whose sides are already multiples of a token's side, so nothing has to be resized here and one
reshape does a whole picture. A test holds this equal to the stock processor.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from qzoom.training.tiny import PATCH_PX, TOKEN_PX

__all__ = ["fit_to_tokens", "patchify", "resize_to_tokens"]


def patchify(picture: np.ndarray) -> np.ndarray:
    """Patches of one picture: (h, w, 3) uint8, sides multiples of 32 -> (h/16 * w/16, 1536) float32."""
    height, width, _ = picture.shape
    merge = TOKEN_PX // PATCH_PX
    blocks = picture.reshape(height // TOKEN_PX, merge, PATCH_PX, width // TOKEN_PX, merge, PATCH_PX, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5).astype(np.float32)
    ordered *= np.float32(2.0 / 255.0)
    ordered -= np.float32(1.0)
    frames = np.repeat(ordered[:, :, :, :, :, None], 2, axis=5)
    return frames.reshape(-1, 3 * 2 * PATCH_PX * PATCH_PX)


def fit_to_tokens(width_px: int, height_px: int, max_tokens: int, min_tokens: int = 1) -> tuple[int, int]:
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


def resize_to_tokens(image: Image.Image, tokens_wh: tuple[int, int]) -> np.ndarray:
    """The picture resized (bicubic) to whole tokens, as RGB pixels (h * 32, w * 32, 3) uint8."""
    size = (tokens_wh[0] * TOKEN_PX, tokens_wh[1] * TOKEN_PX)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))
