"""From a name to an engine: finds out what kind of checkpoint it is and puts base, branches and arithmetic together.

The kinds, in the order in which they are recognised: our adapter (`qzoom_config.json`), the authors' merged checkpoint
(branch fields in config.json, docs/method.md 9), a plain base model (no branches; it answers without zooming).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.base import load_backbone
from qzoom.checkpoints.branches import build_gate, build_region
from qzoom.checkpoints.format import CONFIG_FILE, HERE, AdapterConfig, detect_kind, read_adapter_config
from qzoom.checkpoints.hub import EMBEDDED, Source, find_source
from qzoom.checkpoints.lora import add_to_backbone, read_lora
from qzoom.checkpoints.upstream import branch_keys, is_branch_key, presets_of, read_zoom_config
from qzoom.checkpoints.weights import file_digest, read_index, read_json, read_tensors
from qzoom.config import ZoomConfig
from qzoom.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from qzoom.backbones.base import Backbone
    from qzoom.engine.state import Engine


def load_engine(
    id_or_path: str | Path = "tiny",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    attn_implementation: str = "sdpa",
    config: ZoomConfig | None = None,
    processor: str | Path | None = None,
    quantization: Any = None,
    base_weights: bool = True,
) -> Engine:
    """Load the embedded model, our adapter, a merged checkpoint or a plain base model.

    Args:
        id_or_path: "tiny", a folder, or a hub id.
        revision: branch, tag or commit on the hub.
        dtype: "auto" (see `choose_dtype`), "float32", "bfloat16" or a torch dtype.
        device_map: None or "cpu", "cuda", "cuda:0", "auto"; one device only.
        attn_implementation: "sdpa", "eager", "flash_attention_2" or "flash_attention_3"; see `load_backbone`.
        config: used instead of the checkpoint's own arithmetic; its K and T must be the checkpoint's.
        processor: a folder with tokenizer and image processor, for checkpoints that have none of their own.
        quantization: "4bit", "8bit" or a quantization config of transformers: how the base is held; branches never are.
        base_weights: False loads the branches only, for programs whose base model runs elsewhere.

    Raises:
        CheckpointError: it cannot be found, read or matched to its base.
        ConfigError: an unknown number format or attention, a config or name of another type, or `reread` heads or
            aligned positions that the model does not have.
        DeviceError: a placement that is not supported.
    """
    _check_types(id_or_path, config)
    source = find_source(id_or_path, revision)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
        "processor": None if processor is None else Path(processor),
        "quantization": quantization,
        "weights": base_weights,
    }
    kind = detect_kind(source.folder)
    if kind is None:
        raise CheckpointError(
            f"{source.name} has neither config.json nor {CONFIG_FILE}, so it is no model; "
            "give a folder or hub id that holds one."
        )
    if kind == "adapter":
        return _load_adapter(source, options, config)
    backbone = load_backbone(source.folder, **options)
    _remember(backbone, source)
    if kind == "upstream":
        return _with_upstream_branches(backbone, source, config)
    from qzoom.engine.state import Engine

    # Without branches, K only says where the engine cuts the layers in two.
    own = ZoomConfig(shared_layers=max(1, min(3, backbone.num_layers - 1)), **backbone.zoom_defaults())
    return Engine(backbone, None, None, config or own)


def _check_types(id_or_path: Any, config: Any) -> None:
    """Name an argument of another type (ConfigError)."""
    if not isinstance(id_or_path, str | Path):
        raise ConfigError(f"A model is named by a folder or a hub id, not {id_or_path!r}.")
    if config is not None and not isinstance(config, ZoomConfig):
        kind = type(config).__name__
        raise ConfigError(f"config must be a ZoomConfig, not a {kind}; ZoomConfig.from_dict makes one of a mapping.")


def find_base(adapter: AdapterConfig, source: Source) -> Source:
    """Where the base model of an adapter is (CheckpointError: it cannot be found)."""
    name = adapter.base.id
    if name == HERE:
        return source
    if name == EMBEDDED:
        return find_source(name, adapter.base.revision)
    for folder in (source.folder / name, Path(name).expanduser()):
        if folder.is_dir():
            return Source(folder, str(folder))
    try:
        return find_source(name, adapter.base.revision)
    except CheckpointError as error:
        raise CheckpointError(f"The base model of {source.name} is missing: {error}") from error


def _load_adapter(source: Source, options: dict[str, Any], config: ZoomConfig | None) -> Engine:
    from qzoom.engine.state import Engine

    adapter = read_adapter_config(source.folder)
    base = find_base(adapter, source)
    backbone = load_backbone(base.folder, **options)
    _remember(backbone, base)
    _check_base(adapter, backbone, source.name)
    if adapter.lora_base_weights and not options["weights"]:
        raise CheckpointError(
            f"{source.name} has LoRA weights for its base, which another engine cannot add; write a merged checkpoint "
            f"with `qzoom convert {source.name} MERGED` and use that."
        )
    lora = read_lora(source.folder, adapter.lora_base_weights) if adapter.lora_base_weights else None
    if lora is not None:
        add_to_backbone(backbone, lora, source.name)
    zoom = _checked(config, adapter.zoom, backbone)
    gate = region = None
    if adapter.gate or adapter.region:
        index = read_index(source.folder, stem="qzoom")
        where = str(source.folder / "qzoom.safetensors")
        depth = (backbone, adapter.zoom.shared_layers, adapter.zoom.branch_layers)
        if adapter.gate:
            names = {n.removeprefix("gate."): n for n in index.tensors if n.startswith("gate.")}
            gate = build_gate(*depth, _named(index, names), where=where, prefix="gate.")
        if adapter.region:
            names = {n.removeprefix("region."): n for n in index.tensors if n.startswith("region.")}
            norm = adapter.zoom.branch_norm
            region = build_region(*depth, _named(index, names), where=where, prefix="region.", norm=norm)
    return Engine(backbone, gate, region, zoom, lora)


def _with_upstream_branches(backbone: Backbone, source: Source, config: ZoomConfig | None) -> Engine:
    from qzoom.engine.state import Engine

    settings = read_json(source.folder / "config.json")
    where = str(source.folder / "config.json")
    own = read_zoom_config(settings, backbone.zoom_defaults(), where)
    presets = presets_of(source.name)
    if presets and not own.presets:
        own = own.replace(presets=presets)
    index = read_index(source.folder)
    keys = branch_keys(index.tensors)
    weights = str(source.folder)
    depth = (backbone, own.shared_layers, own.branch_layers)
    if not keys.region:
        raise CheckpointError(
            f"{weights} says enable_twig, but has no twig_layers tensors; fetch all weight files again."
        )
    names = {ours: stored for ours, stored in keys.region.items() if own.branch_norm or ours != "norm.weight"}
    prefix = f"{keys.prefix}twig_"
    region = build_region(*depth, _named(index, names), where=weights, prefix=prefix, norm=own.branch_norm)
    gate = None
    if settings.get("enable_high_res"):
        gate = build_gate(*depth, _named(index, keys.gate), where=weights, prefix=f"{keys.prefix}high_res_")
    return Engine(backbone, gate, region, _checked(config, own, backbone))


def _named(index: Any, names: dict[str, str]) -> dict[str, Any]:
    tensors = read_tensors(index, names.values())
    return {ours: tensors[stored] for ours, stored in names.items()}


def _checked(config: ZoomConfig | None, own: ZoomConfig, backbone: Backbone) -> ZoomConfig:
    """The given arithmetic, else the checkpoint's, if the weights were made for its depths and the model has its
    `reread` heads, and the positions that were given."""
    from qzoom.engine.attention import check_reread_heads
    from qzoom.engine.zoom import check_positions

    rule = (config or own).reread
    if rule is not None:
        check_reread_heads(backbone, [(rule.layer, head) for head in rule.heads])
    if config is None:
        return own
    check_positions(backbone, config)
    for name, symbol in (("shared_layers", "K"), ("branch_layers", "T")):
        if getattr(config, name) != getattr(own, name):
            raise CheckpointError(
                f"The given config has {name}={getattr(config, name)}, but the checkpoint's branches were made for "
                f"{symbol}={getattr(own, name)}; change other fields of model.config only."
            )
    return config if config.provenance else dataclasses.replace(config, provenance=own.provenance)


def _check_base(adapter: AdapterConfig, backbone: Backbone, name: str) -> None:
    base = adapter.base
    for what, needed, found in (
        ("family", base.family, backbone.family),
        ("hidden size", base.hidden_size, backbone.hidden_size),
        ("number of layers", base.layers, backbone.num_layers),
    ):
        if needed != found:
            raise CheckpointError(
                f"The adapter {name} was made for a base with {what} {needed}, but {base.id!r} has {found}; "
                "load it with the base named in its qzoom_config.json."
            )


def _remember(backbone: Backbone, source: Source) -> None:
    """Note on the model where it came from, as an adapter saved later must name its base."""
    backbone.model.config._name_or_path = source.name if source.is_hub else str(source.folder.resolve())
    backbone.model.config._commit_hash = source.revision if source.is_hub else None


def checkpoint_identity(source: Source, base: Source | None = None) -> dict[str, str]:
    """Which weights a checkpoint has, from its files alone: digests of base and branches, "" where there are none.
    `base`: where the base is; None takes the checkpoint's own."""
    adapter = read_adapter_config(source.folder) if detect_kind(source.folder) == "adapter" else None
    base = base or (source if adapter is None else find_base(adapter, source))
    index = read_index(base.folder)
    branches, names = index, [name for name in index.tensors if is_branch_key(name)]
    if adapter is not None:
        names = []
        if adapter.gate or adapter.region:
            branches = read_index(source.folder, stem="qzoom")
            names = list(branches.tensors)
    own = [name for name in index.tensors if not is_branch_key(name)]
    return {"base": file_digest(index, own), "heads": file_digest(branches, names)}
