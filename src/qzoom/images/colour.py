"""Colours to sRGB: embedded ICC profiles, and the gamma and cICP chunks of PNG files.

The pixels that a model sees are sRGB. A picture whose file declares other colours is converted, and a note says so.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import PIL.Image
from PIL import Image, ImageCms

from qzoom.images.depth import map_rows, picture_rows

_MAX_PROFILE_BYTES = 4 << 20
_SRGB_GAMMA = 0.45455
_PRIMARIES = {9: "BT.2020", 12: "Display P3"}
_TO_SRGB = {  # linear light to linear sRGB, D65 to D65
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
_GREY, _FAR = 64, 16  # a grey, and how far a profile other than sRGB moves it
_SDR_TRANSFERS = (1, 6, 13, 14, 15)  # BT.709, BT.601, sRGB, BT.2020 with 10 and 12 bits: all close to sRGB's curve


def apply_profile(image: PIL.Image.Image, profile: Any) -> tuple[PIL.Image.Image, str]:
    """The picture in sRGB, by LittleCMS.

    Args:
        profile: the file's ICC profile; None or b"" for none.

    Returns:
        The picture (RGB, or RGBA if it had transparency; the same one if nothing had to be done) and a note.
    """
    if not isinstance(profile, bytes) or not profile:
        return image, ""
    unused = "its colour profile cannot be used, so its colours are read as sRGB"
    if len(profile) > _MAX_PROFILE_BYTES:
        return image, unused
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower() and _keeps_greys(source):
            return image, ""
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        space = str(source.profile.xcolor_space).strip()
        plain = _in_space(image, space)
        if plain is None:
            return image, unused
        out = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception:  # a hostile profile may make the library fail in any way
        return image, unused
    if out is None:
        return image, unused
    if alpha is not None:
        out.putalpha(alpha)
    return out, "colours converted from its profile to sRGB"


def _keeps_greys(profile: Any) -> bool:
    """Whether a profile that is named after sRGB has its tone curve too; some are linear."""
    grey = Image.new("RGB", (1, 1), (_GREY,) * 3)
    out = ImageCms.profileToProfile(grey, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return out is not None and max(abs(value - _GREY) for value in out.tobytes()) < _FAR


def _in_space(image: PIL.Image.Image, space: str) -> PIL.Image.Image | None:
    """The picture in the mode that a profile's colour space needs; None where that would guess colours."""
    family = "L" if image.mode in ("1", "L", "LA", "La") else "CMYK" if image.mode == "CMYK" else "RGB"
    if space == "GRAY" and family == "L":
        return image.convert("L")
    if space == "RGB" and family != "CMYK":
        return image.convert("RGB")
    if space == "CMYK" and family == "CMYK":
        return image
    return None


def apply_png_colours(image: PIL.Image.Image, data: bytes) -> tuple[PIL.Image.Image, str]:
    """The picture in sRGB, by the cICP or gAMA chunk of its PNG file; an ICC profile or an sRGB chunk outranks gAMA.
    Returns the picture and a note; the same picture and "" where there is nothing to do."""
    chunks = _chunks_before_pixels(data)
    if len(chunks.get(b"cICP", b"")) == 4:
        return _apply_cicp(image, chunks[b"cICP"][0], chunks[b"cICP"][1])
    gamma = int.from_bytes(chunks.get(b"gAMA", b""), "big") / 100_000
    if b"sRGB" in chunks or b"iCCP" in chunks or not 0.05 <= gamma <= 5 or abs(gamma - _SRGB_GAMMA) < 0.02:
        return image, ""
    light = (np.arange(256) / 255) ** (1 / gamma)
    table = (_encode_srgb(light) * 255 + 0.5).astype(np.uint8).tolist()
    colours, alpha = _without_alpha(image)
    return _with_alpha(colours.point(table * 3), alpha), f"colours converted from gamma {gamma:.4g} to sRGB"


def _apply_cicp(image: PIL.Image.Image, primaries: int, transfer: int) -> tuple[PIL.Image.Image, str]:
    if primaries not in _PRIMARIES and transfer in _SDR_TRANSFERS:
        return image, ""
    if transfer not in _SDR_TRANSFERS:
        return image, "its colours are high dynamic range and are read as sRGB"
    colours, alpha = _without_alpha(image)
    encoded = np.arange(256, dtype=np.float32) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = np.array(_TO_SRGB[primaries], np.float32).T

    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (_encode_srgb(np.clip(light[values] @ matrix, 0, 1)) * 255 + 0.5).astype(np.uint8)

    out = map_rows("RGB", image.size, picture_rows(colours), change)
    return _with_alpha(out, alpha), f"colours converted from {_PRIMARIES[primaries]} to sRGB"


def _encode_srgb(light: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


def _without_alpha(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), None
    rgba = image.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _with_alpha(image: PIL.Image.Image, alpha: PIL.Image.Image | None) -> PIL.Image.Image:
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _chunks_before_pixels(data: bytes) -> dict[bytes, bytes]:
    """Small chunks of a PNG file up to its first pixels, by name."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 8 <= len(data) and len(chunks) < 100:
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            break
        chunks[kind] = data[at + 8 : at + 8 + min(size, 64)]
        at += 12 + size
    return chunks
