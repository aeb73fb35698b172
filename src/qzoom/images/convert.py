"""Any mode or array to 8-bit sRGB: high bit depths keep their contrast, transparency lies on white.

Values of more than 8 bits carry no record of how many they use. Whole numbers are read with as many bits, 8 to 16, as
all but one in a thousand of them need, so that a single hot pixel decides nothing. Numbers outside that range and odd
floats are stretched from their lowest to their highest. A note says what was done.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import PIL.Image
from PIL import Image

from qzoom.images.colour import apply_profile
from qzoom.images.limits import ImageLimits, check_size, refuse

_WHITE = (255, 255, 255)
_HIDDEN_RANGE = 24
"""Pictures with transparency whose values lie closer together than this once they are on white show nothing."""
_QUANTILE = 0.999
_CHANNELS = (1, 3, 4)
_PHOTOMETRIC_TAG = 262


def image_to_rgb(image: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, str]:
    """A new RGB picture of a decoded one, whatever its mode (ImageError: values that are not finite, or a mode that has
    no colours). Returns the picture, without metadata, and a note on a guessed value range (empty without one)."""
    notes = []
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        values, clear = np.asarray(image), image.info.get("transparency")
        grey, note = _depth_to_uint8(values, name)
        tags = getattr(image, "tag_v2", None)
        if tags is not None and tags.get(_PHOTOMETRIC_TAG) == 0:  # its lowest value is white, unknown to Pillow
            grey, note = 255 - grey, f"{note}; its zero is white" if note else "its zero is white"
        if isinstance(clear, int):
            grey[values == clear] = 255
        notes.append(note)
        image = Image.fromarray(grey)
    elif image.mode == "LAB":
        image = _lab_to_rgb(image, name)
        profile = None
    elif image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    else:
        image = _with_8bit_key(image)
    image, note = apply_profile(image, profile)
    out, hidden = _on_white(image)
    out.info.clear()
    return out, "; ".join(filter(None, [*notes, note, hidden]))


def _on_white(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str]:
    """The picture as RGB on a white ground, and a note if nothing can be seen there."""
    if not image.has_transparency_data:
        return image.convert("RGB"), ""
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    out = Image.new("RGB", image.size, _WHITE)
    out.paste(rgba.convert("RGB"), mask=alpha)
    lowest = int(np.asarray(out).min())
    opacity = np.asarray(alpha)
    least, most = int(opacity.min()), int(opacity.max())
    if least == 255 or 255 - lowest >= _HIDDEN_RANGE:
        return out, ""
    if most == 0:
        return out, "it is wholly transparent, so it is blank"
    return out, "what is not transparent is white and lies on white, so it looks blank; put it on a dark ground"


def deep_colours(high: PIL.Image.Image, low: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, str]:
    """An 8-bit picture of a 16-bit one that comes as two: its high bytes and its low bytes.

    Args:
        high: RGB or RGBA.
        low: of the same mode and size.

    Returns:
        The picture (transparency kept, its alpha from the high bytes) and a note on the bits that its colours use.
    """
    deep = np.asarray(high.convert("RGB"), np.uint16) << 8 | np.asarray(low.convert("RGB"), np.uint16)
    values, note = _depth_to_uint8(deep, name)
    out = Image.fromarray(values)
    if "A" in high.getbands():
        out.putalpha(high.getchannel("A"))
    out.info = dict(high.info)
    return out, note


def array_of(source: Any) -> np.ndarray[Any, Any] | None:
    """The array of a numpy array or torch tensor, channels last; None for other sources.

    An array's channels come last, or first where only the first axis can hold them; a tensor's come first, or last
    where only the last axis can.
    """
    torch: Any = sys.modules.get("torch")
    tensor = torch is not None and isinstance(source, torch.Tensor)
    if tensor:
        if source.layout != torch.strided or source.is_quantized:
            raise refuse("the tensor", "its values are not dense", "pass tensor.to_dense() or tensor.dequantize()")
        plain = source.detach().cpu()
        array = (plain.float() if plain.dtype in (torch.bfloat16, torch.float16) else plain).numpy()
    elif isinstance(source, np.ndarray):
        array = source
    else:
        return None
    if array.ndim == 3:
        first, last = (array.shape[axis] in _CHANNELS for axis in (0, 2))
        if first and (tensor or not last):
            array = np.moveaxis(array, 0, -1)
    return array


def array_to_rgb(array: np.ndarray[Any, Any], name: str, limits: ImageLimits) -> tuple[PIL.Image.Image, str]:
    """An RGB picture of an array.

    Args:
        array: (height, width) or (height, width, 1, 3 or 4); bool, uint8, uint16, or floats from 0 to 1. The channel
            axis comes last (see `array_of`), colours in the order RGB or RGBA.

    Returns:
        The picture and a note on a guessed value range (empty without one).

    Raises:
        ImageError: wrong shape, type or values.
    """
    shape = "x".join(str(n) for n in array.shape) or "a single number"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        remedy = "pass height x width, or that with 1, 3 or 4 channels last or first"
        raise refuse(name, f"its shape {shape} is not that of a picture", remedy)
    check_size((array.shape[1], array.shape[0]), name, limits)
    values, note = _array_to_uint8(array, name)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    picture = Image.fromarray(np.ascontiguousarray(values))
    rgb, hidden = image_to_rgb(picture, name)
    return rgb, "; ".join(filter(None, [note, hidden]))


def _array_to_uint8(array: np.ndarray[Any, Any], name: str) -> tuple[np.ndarray[Any, Any], str]:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255), ""
    if array.dtype == np.uint8:
        return array, ""
    if array.dtype == np.uint16:
        return _depth_to_uint8(array, name)
    if array.dtype.kind != "f":
        raise refuse(
            name,
            f"its type {array.dtype} is not one of bool, uint8, uint16 or float",
            "convert it, e.g. with array.astype('uint8')",
        )
    _check_finite(array, name)
    low, high = float(array.min()), float(array.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise refuse(
            name,
            f"its floats run from {low:.4g} to {high:.4g} and must run from 0 to 1",
            "divide by the highest possible value, or pass uint8",
        )
    return (np.clip(array, 0, 1).astype(np.float32) * 255 + 0.5).astype(np.uint8), ""


def _depth_to_uint8(values: np.ndarray[Any, Any], name: str) -> tuple[np.ndarray[Any, Any], str]:
    """Deep whole numbers or floats to 8 bits, with a note unless they are 16-bit numbers that use their range."""
    if values.dtype.kind == "f":
        _check_finite(values, name)
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    base, note = 0.0, ""
    if low < 0 or high > (65535.0 if whole else 255.0):
        base, top = low, (high - low) or 1.0
        note = f"values from {low:.6g} to {high:.6g} stretched to 8 bits"
    elif whole:
        ordinary = float(np.quantile(values, _QUANTILE, method="higher"))
        bits = max(8, int(ordinary).bit_length())
        top = float(2**bits - 1)
        if bits < 16 and high > 0:
            brighter = f" (the brightest is {high:.0f})" if high > top else ""
            note = f"values up to {ordinary:.0f}{brighter} read as {bits}-bit"
    else:
        top = 1.0 if high <= 1 else 255.0
    scaled = values.astype(np.float32) - np.float32(base)
    scaled *= np.float32(255.0 / top)
    return (scaled + np.float32(0.5)).clip(0, 255).astype(np.uint8), note


def _check_finite(values: np.ndarray[Any, Any], name: str) -> None:
    if not bool(np.isfinite(values).all()):
        raise refuse(name, "some of its values are NaN or infinite", "replace them, e.g. with numpy.nan_to_num")


def _with_8bit_key(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture from a 16-bit file, whose colours and transparent colour were cut to 8 bits."""
    clear = image.info.get("transparency")
    if not isinstance(clear, tuple) or max(clear) <= 255:
        return image
    out = image.copy()
    out.info["transparency"] = tuple(value >> 8 for value in clear)
    return out


def _lab_to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    try:
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        out = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    except Exception as error:  # this Pillow may lack colour management
        raise refuse(name, "its CIELAB colours cannot be converted here", "convert it to RGB") from error
    if out is None:
        raise refuse(name, "its CIELAB colours cannot be converted here", "convert it to RGB")
    return out
