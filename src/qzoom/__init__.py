"""qzoom: coarse pass, gate, zoom, answer.

`QZoom.from_pretrained(...).ask(picture, question)` is the whole library in one line. Names are loaded on first use, so
that `import qzoom` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qzoom.config import ZoomConfig
    from qzoom.images.limits import ImageLimits
    from qzoom.images.load import load_pictures
    from qzoom.model import QZoom
    from qzoom.types import Answer, Perception, Region

__all__ = ["Answer", "ImageLimits", "Perception", "QZoom", "Region", "ZoomConfig", "__version__", "load_pictures"]
__version__ = "0.1.0"

_HOME = {
    "Answer": "qzoom.types",
    "ImageLimits": "qzoom.images.limits",
    "Perception": "qzoom.types",
    "QZoom": "qzoom.model",
    "Region": "qzoom.types",
    "ZoomConfig": "qzoom.config",
    "load_pictures": "qzoom.images.load",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'qzoom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
