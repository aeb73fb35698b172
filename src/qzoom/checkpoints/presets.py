"""Thresholds published for the released models (method.md 2, 3 and 9).

The gate's thresholds are published as single values; the region's only as ranges, out of which the lower end is taken
here: a low threshold finds more and crops more. "document" is for documents and text, "high_resolution" for large
pictures at up to 4096 coarse tokens, "high_resolution_below_2048" for those at fewer than 2048.
"""

from __future__ import annotations

from qzoom.config import Preset

__all__ = ["RELEASED_PRESETS", "presets_of"]

# Published region ranges. 7B: document 0.125-0.15, high resolution 0.03-0.05. 4B: 0.125-0.15 and 0.05-0.10.
# The 3B model has no published thresholds.
RELEASED_PRESETS: dict[str, dict[str, Preset]] = {
    "YuhengSSS/Q-Zoom-Qwen2.5VL-7B": {
        "document": Preset(gate_threshold=0.05, region_threshold=0.125),
        "high_resolution": Preset(gate_threshold=0.02, region_threshold=0.03),
        "high_resolution_below_2048": Preset(gate_threshold=0.025, region_threshold=0.03),
    },
    "YuhengSSS/Q-Zoom-Qwen3VL-4B": {
        "document": Preset(gate_threshold=0.10, region_threshold=0.125),
        "high_resolution": Preset(gate_threshold=0.025, region_threshold=0.05),
        "high_resolution_below_2048": Preset(gate_threshold=0.05, region_threshold=0.05),
    },
    "YuhengSSS/Q-Zoom-Qwen2.5VL-3B": {},
}


def presets_of(name: str) -> dict[str, Preset]:
    """The presets of a released model.

    Args:
        name: its hub id, or a folder whose last part is the id's last part; anything else has no presets.
    """
    last = name.replace("\\", "/").rstrip("/").split("/")[-1]
    for repo_id, presets in RELEASED_PRESETS.items():
        if name == repo_id or last == repo_id.split("/")[1]:
            return dict(presets)
    return {}
