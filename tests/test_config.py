"""A zoom config that cannot be is refused where it is made, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from qzoom.config import BoxRule, Preset, TokenBudget, ZoomConfig
from qzoom.errors import ConfigError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"coarse_tokens": 144}, "coarse_tokens must be a mapping with min_tokens and max_tokens, not 144"),
    ({"region_tokens": [64, 144]}, "region_tokens must be a mapping with min_tokens and max_tokens"),
    ({"box": None}, "box must be a mapping"),
    ({"box": "union"}, "box must be a mapping"),
    ({"box": {"max_regions": 2.0}}, "max_regions must be a whole number from 1 to 64, not 2.0"),
    ({"box": {"min_side_px": 28.5}}, "min_side_px must be a whole number"),
    ({"shared_layers": 3.0}, "shared_layers must be a whole number"),
    ({"branch_layers": True}, "branch_layers must be a whole number"),
    ({"branch_layers": 0}, "branch_layers must be a whole number from 1"),
    ({"presets": 3}, "presets must be a mapping"),
    ({"presets": {"a": 0.5}}, "presets.a must be a mapping"),
    ({"provenance": "home-made"}, "provenance must be a mapping"),
]


@pytest.mark.parametrize(("values", "said"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_wrong_types_from_json(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", "\\[")):
        ZoomConfig.from_dict(values)


def test_wrong_types_from_python() -> None:
    for values in (
        {"coarse_tokens": (64, 144)},
        {"box": {"max_regions": 2}},
        {"presets": {"a": {"gate_threshold": 1}}},
    ):
        with pytest.raises(ConfigError, match="must be a mapping"):
            ZoomConfig(**values)
        with pytest.raises(ConfigError, match="must be a mapping"):
            ZoomConfig().replace(**values)


def test_a_whole_config_survives_json() -> None:
    made = ZoomConfig(
        box=BoxRule(components="all", max_regions=3, margin_cells=0.5),
        coarse_tokens=TokenBudget(64, 144),
        presets={"document": Preset(0.05, 0.125)},
        provenance={"seed": 1},
    )
    assert ZoomConfig.from_dict(made.to_dict()) == made
