import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qzoom.config import BoxRule, Preset, RereadRule, TokenBudget, ZoomConfig
from qzoom.errors import ConfigError
from qzoom.settings import setting_fields

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"coarse_tokens": 144}, "coarse_tokens must be a mapping with min_tokens and max_tokens or null, not 144"),
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
def test_wrong_types_from_json(values, said):
    with pytest.raises(ConfigError, match=said.replace("[", "\\[")):
        ZoomConfig.from_dict(values)


def test_wrong_types_from_python():
    for values in (
        {"coarse_tokens": (64, 144)},
        {"box": {"max_regions": 2}},
        {"presets": {"a": {"gate_threshold": 1}}},
    ):
        with pytest.raises(ConfigError, match="must be a mapping"):
            ZoomConfig(**values)
        with pytest.raises(ConfigError, match="must be a mapping"):
            ZoomConfig().replace(**values)


def test_a_whole_config_survives_json_and_former_words():
    made = ZoomConfig(
        box=BoxRule(components="all", max_regions=3, margin_cells=0.5),
        coarse_tokens=TokenBudget(64, 144),
        presets={"document": Preset(0.05, 0.125)},
        provenance={"seed": 1},
    )
    assert ZoomConfig.from_dict(made.to_dict()) == made
    rule = BoxRule(threshold="relative", components="peak_component")
    former = {"box": {"threshold": "peak", "components": "peak"}}
    assert ZoomConfig.from_dict(former).box == rule
    assert former == {"box": {"threshold": "peak", "components": "peak"}}
    assert ZoomConfig.from_dict(ZoomConfig(box=rule).to_dict()).box == rule
    with pytest.raises(
        ConfigError, match=r"box\.components must be one of union, peak_component, all, groups, not 'peek'"
    ):
        ZoomConfig.from_dict({"box": {"components": "peek"}})
    with pytest.raises(ConfigError, match="threshold must be one of absolute, relative, not 'peak'"):
        BoxRule(threshold="peak")


def test_presets_and_the_documented_table():
    page = (Path(__file__).parents[1] / "docs" / "zoom-config.md").read_text(encoding="utf-8")
    for cls in (ZoomConfig, BoxRule, RereadRule):
        rows = ["| Field | Default | Meaning |", "|---|---|---|"]
        for entry in setting_fields(cls):
            default = "see below" if entry.name == "box" else "none"
            if default == "none" and entry.default is not dataclasses.MISSING:
                default = f"`{json.dumps(entry.default)}`"
            expects = entry.expects.replace("a mapping with min_tokens and max_tokens", "a `TokenBudget`")
            rows.append(f"| `{entry.name}` | {default} | {' '.join(entry.help.split())} ({expects}) |")
        assert "\n".join(rows) in page, "the table should be:\n" + "\n".join(rows)
    config = ZoomConfig(presets={"document": Preset(0.05, 0.125)})
    assert config.with_preset("document").region_threshold == 0.125
    with pytest.raises(ConfigError, match="No preset 'page' in this checkpoint; known presets: document"):
        config.with_preset("page")
    with pytest.raises(ConfigError, match="did you mean 'gate_threshold'"):
        config.replace(gate_treshold=0.2)
