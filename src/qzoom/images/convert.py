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
from PIL import Image, ImageStat

from qzoom.images.colour import apply_profile
from qzoom.images.depth import Change, map_rows, picture_rows, scale_to_8bit, value_range
from qzoom.images.limits import ImageLimits, check_size, refuse

_WHITE = (255, 255, 255)
_HIDDEN_RANGE = 24
"""Pictures with transparency whose values lie closer together than this once they are on white show nothing."""
_CHANNELS = (1, 3, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PHOTOMETRIC_TAG = 262


def image_to_rgb(image: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, str]:
    """A new RGB picture of a decoded one, whatever its mode (ImageError: values that are not finite, or a mode that has
    no colours). Returns the picture, without metadata, and a note on a guessed value range (empty without one)."""
    notes = []
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image, note = _deep_grey(image, name)
        notes.append(note)
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


def _deep_grey(image: PIL.Image.Image, name: str) -> tuple[PIL.Image.Image, str]:
    """An 8-bit picture of one with deeper grey values, and a note on how they are read."""
    clear, tags, read = image.info.get("transparency"), getattr(image, "tag_v2", None), picture_rows(image)
    scale, note = scale_to_8bit(image.size, read, name)
    inverted = tags is not None and tags.get(_PHOTOMETRIC_TAG) == 0  # its lowest value is white, unknown to Pillow
    if inverted:
        note = f"{note}; its zero is white" if note else "its zero is white"

    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        grey = 255 - scale(values) if inverted else scale(values)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return grey

    return map_rows("L", image.size, read, change), note


def _on_white(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str]:
    """The picture as RGB on a white ground, and a note if nothing can be seen there."""
    if not image.has_transparency_data:
        return image.convert("RGB"), ""
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    out = Image.new("RGB", image.size, _WHITE)
    out.paste(rgba.convert("RGB"), mask=alpha)
    lowest = min(low for low, _ in ImageStat.Stat(out).extrema)
    ((least, most),) = ImageStat.Stat(alpha).extrema
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
    read_high, read_low = picture_rows(high), picture_rows(low)

    def read(top: int, bottom: int) -> np.ndarray[Any, Any]:
        return read_high(top, bottom)[..., :3].astype(np.uint16) << 8 | read_low(top, bottom)[..., :3]

    scale, note = scale_to_8bit(high.size, read, name)
    out = map_rows("RGB", high.size, read, scale)
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
        if source.is_meta:
            raise refuse("the tensor", "it has no values (device 'meta')", "pass a tensor of a device with memory")
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
    plain = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    size_px = (plain.shape[1], plain.shape[0])
    change, note = _array_to_uint8(plain, name)
    mode = _MODES[plain.shape[2] if plain.ndim == 3 else 1]
    picture = map_rows(mode, size_px, lambda top, bottom: plain[top:bottom], change)
    rgb, hidden = image_to_rgb(picture, name)
    return rgb, "; ".join(filter(None, [note, hidden]))


def _array_to_uint8(array: np.ndarray[Any, Any], name: str) -> tuple[Change, str]:
    """How the rows of an array become 8-bit ones, and a note on a guessed value range."""
    if array.dtype == np.bool_:
        return lambda rows: rows.astype(np.uint8) * np.uint8(255), ""
    if array.dtype == np.uint8:
        return lambda rows: rows, ""
    size_px = (array.shape[1], array.shape[0])
    if array.dtype == np.uint16:
        return scale_to_8bit(size_px, lambda top, bottom: array[top:bottom], name)
    if array.dtype.kind != "f":
        raise refuse(
            name,
            f"its type {array.dtype} is not one of bool, uint8, uint16 or float",
            "convert it, e.g. with array.astype('uint8')",
        )
    low, high = value_range(size_px, lambda top, bottom: array[top:bottom], name)
    if low < -1e-6 or high > 1 + 1e-6:
        raise refuse(
            name,
            f"its floats run from {low:.4g} to {high:.4g} and must run from 0 to 1",
            "divide by the highest possible value, or pass uint8",
        )
    return lambda rows: (np.clip(rows, 0, 1).astype(np.float32) * 255 + 0.5).astype(np.uint8), ""


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
