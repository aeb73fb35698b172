"""What kind of checkpoint a folder holds, and what is known of a model from its config.json alone."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qzoom.checkpoints.adapter_config import CONFIG_FILE
from qzoom.checkpoints.released import is_released
from qzoom.checkpoints.weights import read_json
from qzoom.errors import CheckpointError

__all__ = ["Kind", "default_sink", "family_of", "kind_of", "text_settings"]

Kind = Literal["adapter", "released", "plain"]


def kind_of(folder: Path) -> Kind | None:
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
    return "released" if is_released(settings) and settings.get("enable_twig", True) else "plain"


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
