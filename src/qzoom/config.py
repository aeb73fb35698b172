"""What a checkpoint's zooming arithmetic is: one frozen, validated record, JSON in and out.

A checkpoint carries its own arithmetic. `ZoomConfig()` is that of the authors' release (method.md 2-4 and 9): absolute
threshold, one union box, 28 px minimum, float32 cell-to-pixel scaling. Ours may choose otherwise, field by field.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qzoom.errors import BudgetError, ConfigError

__all__ = [
    "BoxRule",
    "Preset",
    "TokenBudget",
    "ZoomConfig",
    "check_choice",
    "check_count",
    "check_range",
    "from_mapping",
    "read_yaml",
    "refuse_unknown",
]


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Limits on visual tokens (merged patches), both inclusive.

    Raises:
        BudgetError: the minimum is below 1 or above the maximum.
    """

    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BudgetError(f"{name} must be a whole number of visual tokens, not {value!r}.")
        if self.min_tokens < 1 or self.max_tokens < self.min_tokens:
            raise BudgetError(
                f"Visual-token limits contradict: min_tokens={self.min_tokens}, max_tokens={self.max_tokens}; "
                "choose 1 <= min_tokens <= max_tokens."
            )


@dataclass(frozen=True, slots=True)
class BoxRule:
    """How a region map becomes boxes (method.md 3). The defaults are the release's.

    Args:
        scaling: "float32" keeps the release's rounding (a box up to the edge of a 1000 px picture may end at 999);
            "exact" uses integer arithmetic and covers every pixel of every chosen cell.
        threshold: "absolute" compares the blurred map itself with the region threshold; "peak" compares it with the
            threshold times the map's maximum.
        components: "union" draws one box around all foreground cells; "peak" keeps the connected component with the
            highest cell; "all" gives one box per connected component, best first.
        max_regions: most boxes per question ("all" only).
        margin_cells: cells added on every side of a box before scaling, clipped to the picture.
        min_side_px: smallest side of a box in original pixels; smaller ones grow about their centre.
        min_peak: with threshold "peak", maps whose maximum is not above this are empty.
    """

    scaling: Literal["float32", "exact"] = "float32"
    threshold: Literal["absolute", "peak"] = "absolute"
    components: Literal["union", "peak", "all"] = "union"
    max_regions: int = 1
    margin_cells: float = 0.0
    min_side_px: int = 28
    min_peak: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "scaling", ("float32", "exact"))
        check_choice(self, "threshold", ("absolute", "peak"))
        check_choice(self, "components", ("union", "peak", "all"))
        check_count(self, "max_regions", 1, 64)
        check_range(self, "margin_cells", 0, 64)
        check_count(self, "min_side_px", 1, 4096)
        check_range(self, "min_peak", 0, 1)


@dataclass(frozen=True, slots=True)
class Preset:
    """A named pair of thresholds, e.g. the release's for documents."""

    gate_threshold: float
    region_threshold: float

    def __post_init__(self) -> None:
        check_range(self, "gate_threshold", 0, 1)
        check_range(self, "region_threshold", 0, 1)


@dataclass(frozen=True, slots=True)
class ZoomConfig:
    """All that turns a base model's hidden states into a decision, boxes and a second look.

    Args:
        shared_layers: K, the decoder layers that the coarse look, both branches and the answer share ("twig_K").
        branch_layers: T, the depth of the gate and of the region branch ("twig_T").
        gate_threshold: zoom when the gate's probability is at least this.
        region_threshold: foreground when the blurred map is above this (see `BoxRule.threshold`).
        sink: how sink cells are taken out of the region map: "first_token" (release, Qwen3-VL: the first prompt token's
            head-0 query), "corner" (release, Qwen2.5-VL: corner cells of maps above 256 cells), or "none".
        sink_threshold: cells whose first-token probability reaches this are dropped ("first_token" only).
        positions: "second_image" gives the crop stock positions; "aligned" interpolates its positions from the
            coarse cells that its box covers (method.md 4, "reuse_src_pos").
        temporal_shift: with aligned positions, "max" (release) or "min" (paper) of the coarse grid's sides.
        box: how the map becomes boxes.
        coarse_tokens: limits of the coarse look, per picture; None leaves the image processor's own limits.
        region_tokens: limits of all regions together; None uses the coarse limits, as the release does.
        presets: named threshold pairs.
        provenance: free text facts about how the heads were made.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    shared_layers: int = 3
    branch_layers: int = 3
    gate_threshold: float = 0.1
    region_threshold: float = 0.1
    sink: Literal["first_token", "corner", "none"] = "first_token"
    sink_threshold: float = 0.75
    positions: Literal["second_image", "aligned"] = "second_image"
    temporal_shift: Literal["max", "min"] = "max"
    box: BoxRule = field(default_factory=BoxRule)
    coarse_tokens: TokenBudget | None = None
    region_tokens: TokenBudget | None = None
    presets: dict[str, Preset] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count(self, "shared_layers", 1, 1000)
        check_count(self, "branch_layers", 1, 1000)
        check_range(self, "gate_threshold", 0, 1)
        check_range(self, "region_threshold", 0, 1)
        check_range(self, "sink_threshold", 0, 1)
        check_choice(self, "sink", ("first_token", "corner", "none"))
        check_choice(self, "positions", ("second_image", "aligned"))
        check_choice(self, "temporal_shift", ("max", "min"))
        for name, kind in _NESTED.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "box"):
                keys = " and ".join(f.name for f in dataclasses.fields(kind)) if kind is TokenBudget else "box rules"
                raise ConfigError(f"ZoomConfig.{name} must be a mapping with {keys}, not {value!r}.")
        if not isinstance(self.presets, dict) or not all(isinstance(p, Preset) for p in self.presets.values()):
            raise ConfigError(f"ZoomConfig.presets must be a mapping of names to thresholds, not {self.presets!r}.")
        if not isinstance(self.provenance, dict):
            raise ConfigError(f"ZoomConfig.provenance must be a mapping of facts, not {self.provenance!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "zoom config") -> ZoomConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key (with the closest known one) or a bad value.
        """
        return from_mapping(cls, values, source)

    def replace(self, **changes: Any) -> ZoomConfig:
        """A copy with some fields changed; unknown names are refused with a hint."""
        refuse_unknown(type(self), changes, "zoom config")
        return dataclasses.replace(self, **changes)

    def with_preset(self, name: str) -> ZoomConfig:
        """The config with a named preset's thresholds.

        Raises:
            ConfigError: no preset of that name.
        """
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise ConfigError(f"No preset {name!r} in this checkpoint; known presets: {known}.")
        preset = self.presets[name]
        return self.replace(gate_threshold=preset.gate_threshold, region_threshold=preset.region_threshold)


_NESTED: dict[str, type] = {"box": BoxRule, "coarse_tokens": TokenBudget, "region_tokens": TokenBudget}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML recipe.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read ({error.strerror}); give the path of a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Recipe {path} must be a mapping of settings, not {type(values).__name__}.")
    return values


def from_mapping(cls: type, values: Any, source: str) -> Any:
    """Build a config dataclass from a mapping, nested ones included.

    Args:
        cls: the dataclass to build.
        values: what was read from JSON or YAML.
        source: file or section name for the error text.

    Raises:
        ConfigError: not a mapping, an unknown key, or a bad value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of settings, not {type(values).__name__}.")
    refuse_unknown(cls, values, source)
    out = dict(values)
    if cls is ZoomConfig:
        for name, kind in _NESTED.items():
            if isinstance(out.get(name), dict):
                out[name] = from_mapping(kind, out[name], f"{source}: {name}")
        presets = out.get("presets", {})
        if not isinstance(presets, dict):
            raise ConfigError(f"{source}: presets must be a mapping of names to thresholds.")
        out["presets"] = {k: from_mapping(Preset, v, f"{source}: presets.{k}") for k, v in presets.items()}
    try:
        return cls(**out)
    except TypeError as error:
        raise ConfigError(f"{source}: {error}.") from error


def refuse_unknown(cls: type, values: dict[str, Any], source: str) -> None:
    """Raise `ConfigError` for a key that `cls` has no field for, with the closest name it has."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}."
            raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` when a field holds none of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{type(config).__name__}.{name} must be one of {', '.join(choices)}, not {value!r}.")


def check_range(config: Any, name: str, low: float, high: float) -> None:
    """Raise `ConfigError` when a field is no number from `low` to `high`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}.{name} must be a number from {low} to {high}, not {value!r}.")


def check_count(config: Any, name: str, low: int, high: int) -> None:
    """Raise `ConfigError` when a field is no whole number from `low` to `high`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{type(config).__name__}.{name} must be a whole number from {low} to {high}, not {value!r}.")
