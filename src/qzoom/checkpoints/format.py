"""`qzoom_config.json`: which base model an adapter belongs to, which branches it has, and its arithmetic.

What kind of checkpoint a folder holds, and what is known of a model from its config.json alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qzoom.checkpoints.upstream import is_upstream
from qzoom.checkpoints.weights import read_json
from qzoom.config import ZoomConfig, from_mapping
from qzoom.errors import CheckpointError, ConfigError

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "HERE",
    "AdapterConfig",
    "BaseReference",
    "Kind",
    "default_sink",
    "detect_kind",
    "family_of",
    "read_adapter_config",
    "text_settings",
]


CONFIG_FILE = "qzoom_config.json"
FORMAT_VERSION = 2
"""1 is written where nothing needs more, so that older versions of qzoom read it; 2 has LoRA weights."""
HERE = "."


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The base model that an adapter needs.

    Args:
        id: hub id, folder (relative ones start at the adapter's), or "." when the base lies in the same folder.
        revision: hub revision; None is the default branch.
        family: its model type, e.g. "qwen3_vl".
        hidden_size: width of its decoder.
        layers: number of its decoder layers.
    """

    id: str
    revision: str | None
    family: str
    hidden_size: int
    layers: int

    def __post_init__(self) -> None:
        for name, kind in (("id", str), ("family", str), ("hidden_size", int), ("layers", int)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not value:
                raise ConfigError(f"base.{name} must be a {kind.__name__}, not {value!r}.")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConfigError(f"base.revision must be a text or null, not {self.revision!r}.")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """All of `qzoom_config.json`.

    Args:
        base: the model it belongs to.
        zoom: the arithmetic.
        gate: whether there is a gate to use.
        region: whether there is a region branch to use.
        lora_base_weights: digest of the base's linear maps that the LoRA weights in `lora/` belong to (see
            `checkpoints.lora.maps_digest`); empty without LoRA weights.
        format_version: of the file; newer ones than this library's are refused.
        qzoom_version: what wrote it.
    """

    base: BaseReference
    zoom: ZoomConfig
    gate: bool
    region: bool
    lora_base_weights: str = ""
    format_version: int = 1
    qzoom_version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        out = dataclasses.asdict(self)
        if self.lora_base_weights:
            return out | {"format_version": FORMAT_VERSION}
        del out["lora_base_weights"]
        return out

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The `qzoom_config.json` of a folder.

    Raises:
        CheckpointError: missing, not JSON, written by a newer format, an unknown or missing key, a bad value.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} has no format_version, so it is not a qzoom adapter's config.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, but this qzoom reads up to {FORMAT_VERSION}; upgrade qzoom."
        )
    try:
        ready = dict(values)
        if "base" in values:
            ready["base"] = from_mapping(BaseReference, values["base"], f"{path}: base")
        if "zoom" in values:
            ready["zoom"] = ZoomConfig.from_dict(values["zoom"], source=f"{path}: zoom")
        config: AdapterConfig = from_mapping(AdapterConfig, ready, str(path))
    except ConfigError as error:
        raise CheckpointError(_sentence(str(error))) from error
    if not isinstance(config.gate, bool) or not isinstance(config.region, bool):
        raise CheckpointError(f"{path}: gate and region must be true or false.")
    if not isinstance(config.lora_base_weights, str):
        raise CheckpointError(f"{path}: lora_base_weights must be a text.")
    return config


def _sentence(text: str) -> str:
    """Python's words for a missing argument in those of the file."""
    return (
        text.replace("AdapterConfig.__init__() ", "")
        .replace("BaseReference.__init__() ", "")
        .replace("required positional argument", "required key")
    )


Kind = Literal["adapter", "upstream", "plain"]


def detect_kind(folder: Path) -> Kind | None:
    """The kind of checkpoint in a folder: ours, the authors' merged one, a plain base model; None for none.

    A merged checkpoint whose branches are switched off counts as a plain model.

    Raises:
        CheckpointError: a config.json that cannot be read.
    """
    if (folder / CONFIG_FILE).is_file():
        return "adapter"
    if not (folder / "config.json").is_file():
        return None
    settings = read_json(folder / "config.json")
    return "upstream" if is_upstream(settings) and settings.get("enable_twig", True) else "plain"


def family_of(settings: Mapping[str, Any], where: str) -> str:
    """The model type of a config.json, if it is supported.

    Raises:
        CheckpointError: it is not.
    """
    from qzoom.backbones.registry import FAMILIES

    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"{where} is a model of type {kind!r}; supported types are {', '.join(FAMILIES)}.")
    return str(kind)


def default_sink(family: str) -> Any:
    """The sink rule that the release uses for a family."""
    from qzoom.backbones.registry import FAMILIES

    module, name = FAMILIES[family].split(":")
    return getattr(importlib.import_module(module), name).default_sink


def text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a config.json; older files keep it at the top."""
    inner = settings.get("text_config")
    return inner if isinstance(inner, dict) else settings
