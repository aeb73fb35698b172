"""Pictures and models as the command line names them.

Pictures are checked before the model is loaded, so that a mistyped path is answered at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from qzoom.images.load import LoadedImage
    from qzoom.model import QZoom

__all__ = ["load_model", "read_pictures", "thresholds"]


def read_pictures(names: list[str]) -> list[LoadedImage]:
    """Decode the pictures; `-` is standard input.

    Raises:
        typer.BadParameter: `-` with nothing piped in.
        ImageError: a picture that cannot be used.
    """
    from qzoom.images.load import load_image

    return [load_image(_read_stdin() if name == "-" else name) for name in names]


def _read_stdin() -> bytes:
    from qzoom.images.limits import ImageLimits

    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("- reads a picture from standard input, but none is piped in.")
    return sys.stdin.buffer.read(ImageLimits().max_bytes + 1)


def load_model(name: str, revision: str | None, device: str, dtype: str) -> QZoom:
    """The model to ask.

    Raises:
        QZoomError: it cannot be found, read or placed.
    """
    from qzoom.model import QZoom

    return QZoom.from_pretrained(name, revision=revision, dtype=dtype, device_map=device)


def thresholds(
    model: QZoom, preset: str | None, gate: float | None, region: float | None
) -> tuple[float | None, float | None]:
    """Gate and region threshold: given ones first, then the preset's, then None for the checkpoint's.

    Raises:
        ConfigError: no preset of that name.
    """
    if preset is None:
        return gate, region
    chosen = model.config.with_preset(preset)
    return (
        chosen.gate_threshold if gate is None else gate,
        chosen.region_threshold if region is None else region,
    )
