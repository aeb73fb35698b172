"""The authors' format, "upstream": a whole model with the branches under its language model (docs/method.md 9).

Its config fields become a `ZoomConfig` and back; fields that mean nothing here are kept as they are, so that a
checkpoint can be written back without loss. The published models' thresholds are here too (docs/method.md 2, 3 and 9):
the gate's are published as single values; the region's only as ranges, of which the lower end is taken, since a low
threshold finds more and crops more. "document" is for documents and text, "high_resolution" for large pictures at up to
4096 coarse tokens, "high_resolution_below_2048" for those at fewer than 2048.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qzoom.config import Preset, ZoomConfig
from qzoom.errors import CheckpointError, ConfigError

# Published region ranges. 7B: document 0.125-0.15, high resolution 0.03-0.05. 4B: 0.125-0.15 and 0.05-0.10.
# The 3B model has no published thresholds.
_LLAVA_7B = "YuhengSSS/llava-v1.5-7b-roi-K15T3-152k-v1bf16Mheads-twiginit-filled"
_LLAVA_13B = "YuhengSSS/llava-v1.5-13b-roi-K15T3-152k-v1bf16Mheads-twiginit"
_LLAVA_PRESETS = {
    "scene_text": Preset(gate_threshold=0.1, region_threshold=0.15),
    "document": Preset(gate_threshold=0.1, region_threshold=0.1),
    "high_resolution": Preset(gate_threshold=0.1, region_threshold=0.1),
    "characters": Preset(gate_threshold=0.1, region_threshold=0.05),
}
UPSTREAM_PRESETS: dict[str, dict[str, Preset]] = {
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
    _LLAVA_7B: dict(_LLAVA_PRESETS),
    _LLAVA_13B: dict(_LLAVA_PRESETS),
}


def presets_of(name: str) -> dict[str, Preset]:
    """The presets of a released model. `name`: its hub id, or a folder whose last part is the id's last part; anything
    else has no presets."""
    last = name.replace("\\", "/").rstrip("/").split("/")[-1]
    for repo_id, presets in UPSTREAM_PRESETS.items():
        if name == repo_id or last == repo_id.split("/")[1]:
            return dict(presets)
    return {}


UPSTREAM_BASES = {_LLAVA_7B: "llava-hf/llava-1.5-7b-hf", _LLAVA_13B: "llava-hf/llava-1.5-13b-hf"}
"""Released models that lack tensors, and a complete model that has them: the 7B's vision tower, where the one that it
names cannot be read, and all of the 13B above its branch. The bases are transformers' copies in safetensors of those
that the authors fill from."""


def base_of(name: str) -> str | None:
    """The base that a released model is filled in from; None for names that are not known. `name`: its hub id, a folder
    whose last part is the id's, or the hub's cache folder of it."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    for repo_id, base in UPSTREAM_BASES.items():
        if repo_id.split("/")[1] == parts[-1] or "models--" + repo_id.replace("/", "--") in parts:
            return base
    return None


PROVENANCE_KEY = "released"
ZOOM_KEY = "qzoom"
_DEFAULTS = ZoomConfig()
_BRANCH = re.compile(
    r"(?P<prefix>.*?)(?P<branch>twig_|high_res_)(?P<name>(layers\.\d+\..+)|(head\.(weight|bias))|norm\.weight)"
)
_FIELD = re.compile(r"(twig|roi|high_res)_.+|enable_(twig|high_res)|reuse_src_pos|add_noise_to_roi")


@dataclass(frozen=True, slots=True)
class BranchKeys:
    """The branch tensors of a merged checkpoint."""

    prefix: str  # what stands before them, e.g. "model.language_model."
    region: dict[str, str]  # our name to the stored name
    gate: dict[str, str]  # our name to the stored name; empty without a gate
    idle: tuple[str, ...] = ()  # names of what neither uses


def is_branch_key(name: str) -> bool:
    """Whether a stored tensor belongs to a branch and not to the base model."""
    return _BRANCH.fullmatch(name) is not None


def is_upstream(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a merged checkpoint."""
    return "twig_K" in config or "enable_twig" in config


def branch_keys(names: Iterable[str]) -> BranchKeys:
    """Sort the branch tensors of a merged checkpoint out of all names."""
    region: dict[str, str] = {}
    gate: dict[str, str] = {}
    prefix = ""
    idle = []
    for name in sorted(names):
        match = _BRANCH.fullmatch(name)
        if match and match["branch"] == "twig_" and match["name"].startswith("head."):
            idle.append(name)
        elif match:
            prefix = match["prefix"]
            (region if match["branch"] == "twig_" else gate)[match["name"]] = name
    return BranchKeys(prefix, region, gate, tuple(idle))


def upstream_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a merged config.json that a plain base model's lacks."""
    return {key: value for key, value in config.items() if _FIELD.fullmatch(key) or key == ZOOM_KEY}


def read_zoom_config(config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> ZoomConfig:
    """The arithmetic of a merged checkpoint, always the release's own (CheckpointError: K or T missing, of the wrong
    kind, or different for gate and region branch; settings of ours that are wrong)."""
    fields = upstream_fields(config)
    if ZOOM_KEY in fields:
        try:
            return ZoomConfig.from_dict(fields[ZOOM_KEY], source=f"{where}: {ZOOM_KEY}")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
    shared, depth = (_whole(fields, name, where) for name in ("twig_K", "twig_T"))
    for name, value in (("high_res_K", shared), ("high_res_T", depth)):
        if fields.get("enable_high_res") and fields.get(name) not in (None, value):
            raise CheckpointError(
                f"{where}: {name}={fields[name]} differs from twig_{name[-1]}={value}; gate and region branch must "
                "start from the same layer and be equally deep."
            )
    threshold = fields.get("high_res_thresh")
    try:
        own: dict[str, Any] = dict(defaults)
        if fields.get("roi_multi_head") is False:
            own["map_heads"] = "joined"
        if fields.get("roi_super_type", "v1") != "v1":
            own["branch_norm"] = False
        return ZoomConfig(
            shared_layers=shared,
            branch_layers=depth,
            gate_threshold=_DEFAULTS.gate_threshold if threshold is None else threshold,
            positions="aligned" if fields.get("reuse_src_pos") else "second_image",
            provenance={PROVENANCE_KEY: {"fields": fields}},
            **own,
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


_FACTS: dict[str, type] = {"fields": dict, "settings": dict, "shards": dict, "names": list}


def released_facts(config: ZoomConfig) -> dict[str, Any] | None:
    """What a config keeps of the merged checkpoint that it came from; None for others (CheckpointError: a part of it is
    of another type)."""
    kept = config.provenance.get(PROVENANCE_KEY)
    if not isinstance(kept, dict):
        return None
    for name, kind in _FACTS.items():
        if name in kept and not isinstance(kept[name], kind):
            raise CheckpointError(
                f"The zoom config's provenance.{PROVENANCE_KEY}.{name} must be a {kind.__name__}, not "
                f"{type(kept[name]).__name__}; take provenance.{PROVENANCE_KEY} out of qzoom_config.json."
            )
    return kept


def to_upstream_fields(config: ZoomConfig, *, has_gate: bool, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields of a merged checkpoint with this arithmetic.

    What the authors' fields cannot express is kept whole under one extra field, which their code ignores.

    Args:
        config: the arithmetic; fields it was once read from are written back as they were.
    """
    kept = released_facts(config)
    fields: dict[str, Any] = dict(_NEW_FIELDS) if kept is None else dict(kept.get("fields", {}))
    fields.pop(ZOOM_KEY, None)
    fields |= {"twig_K": config.shared_layers, "twig_T": config.branch_layers}
    for name, on in (("reuse_src_pos", config.positions == "aligned"), ("enable_high_res", has_gate)):
        if on or name in fields or kept is None:
            fields[name] = on
    if has_gate:
        for name, value in (("high_res_K", config.shared_layers), ("high_res_T", config.branch_layers)):
            if name in fields or kept is None:
                fields[name] = value
        if "high_res_thresh" in fields or config.gate_threshold != _DEFAULTS.gate_threshold:
            fields["high_res_thresh"] = config.gate_threshold
    if config.map_heads == "joined":
        fields["roi_multi_head"] = False
    derived = read_zoom_config(fields, defaults, "config")
    same = derived.replace(provenance={}) == config.replace(provenance={}, presets={})
    more = set(config.provenance) - {PROVENANCE_KEY} or (config.presets and kept is None)
    if more or not same:
        fields[ZOOM_KEY] = config.to_dict()
    return fields


_NEW_FIELDS: dict[str, Any] = {
    "enable_twig": True,
    "roi_source": "qk",
    "roi_loss": "bce",
    "roi_super_type": "v1",
    "roi_multi_head": True,
    "roi_enable2stage": True,
    "roi_post_training": False,
    "add_noise_to_roi": False,
}


def _whole(fields: Mapping[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = f"{name}={value!r}" if name in fields else f"no {name}"
        raise CheckpointError(f"{where} has {said}; a merged Q-Zoom checkpoint states it as a whole number above 0.")
    return value
