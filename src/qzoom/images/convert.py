"""Any mode or array to 8-bit RGB: high bit depths keep their contrast, transparency lies on white.

Values of more than 8 bits carry no record of how many they use. Whole numbers are read as 8, 12 or 16 bits, whichever
the highest value needs; numbers outside that range and odd floats are stretched from their lowest to their highest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
from PIL import Image

from qzoom.images.limits import ImageLimits, check_size, refuse

__all__ = ["array_to_rgb", "image_to_rgb"]

_WHITE = (255, 255, 255)


def image_to_rgb(image: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, str]:
    """A new RGB picture of a decoded one, whatever its mode.

    Args:
        image: decoded, of any mode.
        name: the source, for errors.

    Returns:
        The picture, without metadata, and a note on a guessed value range (empty without one).

    Raises:
        ImageError: values that are not finite, or a mode that has no colours.
    """
    note = ""
    if image.mode.startswith("I") or image.mode == "F":
        values, clear = np.asarray(image), image.info.get("transparency")
        grey, note = _depth_to_uint8(values, name)
        if isinstance(clear, int):
            grey[values == clear] = 255
        out = Image.fromarray(grey).convert("RGB")
    elif image.mode == "LAB":
        out = _lab_to_rgb(image, name)
    elif image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else _with_8bit_key(image)
        rgba = straight.convert("RGBA")
        out = Image.new("RGB", image.size, _WHITE)
        out.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    else:
        out = image.convert("RGB")
    out.info.clear()
    return out, note


def array_to_rgb(array: np.ndarray[Any, Any], name: str, limits: ImageLimits) -> tuple[PIL.Image.Image, str]:
    """An RGB picture of an array.

    Args:
        array: (height, width) or (height, width, 1, 3 or 4); bool, uint8, uint16, or floats from 0 to 1. The channel
            axis comes last, colours in the order RGB or RGBA.
        name: the source, for errors.
        limits: limits on its size.

    Returns:
        The picture and a note on a guessed value range (empty without one).

    Raises:
        ImageError: wrong shape, type or values.
    """
    shape = "x".join(str(n) for n in array.shape) or "a single number"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        remedy = (
            "move the channels last with numpy.moveaxis(array, 0, -1)"
            if channels_first
            else "pass height x width, or height x width x 1, 3 or 4 channels"
        )
        raise refuse(name, f"its shape {shape} is not that of a picture", remedy)
    check_size((array.shape[1], array.shape[0]), name, limits)
    values, note = _array_to_uint8(array, name)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    picture = Image.fromarray(np.ascontiguousarray(values))
    return image_to_rgb(picture, name)[0], note


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
    note = ""
    top = next((t for t in ((255.0, 4095.0, 65535.0) if whole else (1.0, 255.0)) if high <= t), 0.0)
    if low < 0 or not top:
        base, top = low, (high - low) or 1.0
        note = f"values from {low:.6g} to {high:.6g} stretched to 8 bits"
    else:
        base = 0.0
        if whole and top < 65535 and high > 0:
            note = f"values up to {high:.0f} read as {8 if top == 255 else 12}-bit"
    scaled = values.astype(np.float32) - np.float32(base)
    scaled *= np.float32(255.0 / top)
    return (scaled + np.float32(0.5)).clip(0, 255).astype(np.uint8), note


def _check_finite(values: np.ndarray[Any, Any], name: str) -> None:
    if not bool(np.isfinite(values).all()):
        raise refuse(name, "some of its values are NaN or infinite", "replace them, e.g. with numpy.nan_to_num")


def _with_8bit_key(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture from a 16-bit file, whose colours were cut to 8 bits, with its transparent colour cut likewise."""
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
