"""A picture's bytes for the exported data: its own file where any reader sees what a person sees, else encoded anew."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from qzoom.distill.pictures import load_source
from qzoom.distill.records import Picture

__all__ = ["Encoded", "encode_picture"]

_ORIENTATION_TAG = 0x0112
_PLAIN = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded picture.

    Args:
        data: its bytes; None when it lies in a file.
        path: the file, or a name by its digest.
    """

    data: bytes | None
    path: str


def encode_picture(
    picture: Picture, encoding: str = "png", quality: int = 95, images: tuple[Path, Path] | None = None
) -> Encoded:
    """The upright RGB picture as bytes.

    Args:
        picture: which.
        encoding: "png" or "jpeg", for pictures whose own file cannot be taken over.
        quality: of JPEG.
        images: write it to the first folder and name it as in the second; None gives the bytes.

    Raises:
        ImageError: the picture is missing or cannot be decoded.
    """
    data, suffix = _own_file(picture)
    if data is None:
        image = load_source(picture.source, picture.root).image
        buffer = io.BytesIO()
        if encoding == "jpeg":
            image.save(buffer, "JPEG", quality=quality)
        else:
            image.save(buffer, "PNG")
        data, suffix = buffer.getvalue(), "jpg" if encoding == "jpeg" else "png"
    name = f"{picture.digest}.{suffix}"
    if images is None:
        return Encoded(data, name)
    images[0].mkdir(exist_ok=True)
    (images[0] / name).write_bytes(data)
    return Encoded(None, str(images[1] / name))


def _own_file(picture: Picture) -> tuple[bytes | None, str]:
    """The file's bytes and suffix when it is a plain upright RGB picture."""
    from PIL import Image

    if not picture.root:
        return None, ""
    path = Path(picture.root) / picture.source
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=tuple(_PLAIN)) as image:
            upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
            plain = image.mode == "RGB" and getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
            known = image.size == (picture.width, picture.height)
            return (data, _PLAIN[str(image.format)]) if upright and plain and known else (None, "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None, ""
