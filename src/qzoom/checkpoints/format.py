"""`qzoom_config.json`: which base model an adapter belongs to, which branches it has, and its arithmetic.

Also format detection: what kind of checkpoint a folder holds, and what is known of a model from its config.json alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from qzoom.checkpoints.upstream import is_upstream
from qzoom.checkpoints.weights import read_json
from qzoom.config import ZoomConfig, with_current_words
from qzoom.errors import CheckpointError, ConfigError
from qzoom.settings import Between, Text, from_mapping, settings

CONFIG_FILE = "qzoom_config.json"
FORMAT_VERSION = 2
"""1 is written where nothing needs more, so that older versions of qzoom read it; 2 has LoRA weights."""
HERE = "."


@settings
class BaseReference:
    """The base model that an adapter needs."""

    id: Text
    """Hub id, folder (relative ones start at the adapter's), or "." when the base lies in the same folder."""
    revision: str | None
    """Hub revision; None is the default branch."""
    family: Text
    """Its model type."""
    hidden_size: Annotated[int, Between(1)]
    """Width of its decoder."""
    layers: Annotated[int, Between(1)]
    """Number of its decoder layers."""


@settings
class AdapterConfig:
    """All of `qzoom_config.json`."""

    base: BaseReference
    """The model it belongs to."""
    zoom: ZoomConfig
    """The arithmetic."""
    gate: bool
    """Whether there is a gate to use."""
    region: bool
    """Whether there is a region branch to use."""
    lora_base_weights: str = ""
    """Digest of the base's linear maps that the LoRA weights in `lora/` belong to (see `weights.maps_digest`); empty
    without LoRA weights."""
    format_version: int = 1
    """Of the file; newer ones than this library's are refused."""
    qzoom_version: str = ""
    """What wrote it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only."""
        out = dataclasses.asdict(self)
        if self.lora_base_weights:
            return out | {"format_version": FORMAT_VERSION}
        del out["lora_base_weights"]
        return out

    def save(self, folder: Path) -> None:
        """Write it into a folder (CheckpointError: a value in `provenance` that JSON does not have, such as NaN)."""
        try:
            text = json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The config's provenance cannot be written as JSON ({error}); change it.") from error
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The `qzoom_config.json` of a folder (CheckpointError: missing, not JSON, written by a newer format, an unknown or
    missing key, a bad value)."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} has no format_version, so it is not a qzoom adapter's config.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, but this qzoom reads up to {FORMAT_VERSION}; upgrade qzoom."
        )
    if "zoom" in values:
        values |= {"zoom": with_current_words(values["zoom"])}
    try:
        return from_mapping(AdapterConfig, values, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


Kind = Literal["adapter", "upstream", "plain"]


def detect_kind(folder: Path) -> Kind | None:
    """The kind of checkpoint in a folder: ours, the authors' merged one, a plain base model; None for none.

    A merged checkpoint whose branches are switched off counts as a plain model (CheckpointError: a config.json that
    cannot be read).
    """
    if (folder / CONFIG_FILE).is_file():
        return "adapter"
    if not (folder / "config.json").is_file():
        return None
    settings = read_json(folder / "config.json")
    return "upstream" if is_upstream(settings) and settings.get("enable_twig", True) else "plain"


def family_of(settings: Mapping[str, Any], where: str) -> str:
    """The model type of a config.json, if it is supported (CheckpointError: it is not)."""
    from qzoom.backbones.registry import backbone_class

    return backbone_class(settings.get("model_type"), where).family


def text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of a config.json; older files keep it at the top."""
    inner = settings.get("text_config")
    return inner if isinstance(inner, dict) else settings


def decoder_sizes(settings: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Width and number of layers of the decoder of a config.json (CheckpointError: it does not state them as whole
    numbers above 0)."""
    text = text_settings(settings)
    for name in ("hidden_size", "num_hidden_layers"):
        value = text.get(name)
        if type(value) is not int or value < 1:
            said = f"{name}={value!r}" if name in text else f"no {name}"
            raise CheckpointError(f"{where} has {said}; a model's config states it as a whole number above 0.")
    return text["hidden_size"], text["num_hidden_layers"]
