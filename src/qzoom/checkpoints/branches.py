"""Branches out of checkpoints: fit checks from file headers alone, and branch modules from named tensors.

Both formats end here as a mapping of our names (`layers.0.self_attn.q_proj.weight`, `head.bias`) to tensors. The region
branch may come without the parts of its last layer that are never used: only norm, queries and keys run
(docs/method.md 3).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

from qzoom.checkpoints.weights import WeightIndex, check_finite, maps_digest
from qzoom.config import ZoomConfig
from qzoom.errors import CheckpointError, ConfigError, listed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qzoom.backbones.base import Backbone
    from qzoom.engine.state import Engine
    from qzoom.heads.branches import GateBranch, RegionBranch

_FIRST_NORM = re.compile(r"((?:.*\.)?)layers\.0\.input_layernorm\.weight")


def decoder_prefix(index: WeightIndex) -> str:
    """What stands before `layers.0` in the names of a base model's decoder (CheckpointError: no decoder layers)."""
    for name in sorted(index.tensors):
        match = _FIRST_NORM.fullmatch(name)
        if match:
            return match[1]
    raise CheckpointError(f"{index.folder} holds no decoder layers; it is not the base model.")


def check_branch(
    own: WeightIndex,
    names: Mapping[str, str],
    base: WeightIndex,
    zoom: ZoomConfig,
    *,
    what: str,
    where: str,
    may_lack_unused: bool = False,
) -> None:
    """Compare a branch with the base's layers.

    Args:
        own: the branch's tensors.
        names: our name to the name in `own`.
        zoom: K and T.
        may_lack_unused: the last layer may hold only what is used.

    Raises:
        CheckpointError: wrong K or T, missing, unknown or misshapen tensors; it names them.
    """
    prefix, depth = decoder_prefix(base), zoom.branch_layers
    layers = layer_count([name.removeprefix(prefix) for name in base.tensors if name.startswith(f"{prefix}layers.")])
    check_depth(zoom.shared_layers, depth, layers, list(names), where=where, what=what)
    shapes = _expected(base, prefix, zoom.shared_layers, depth)
    if what != "gate" and zoom.branch_norm:
        shapes |= {"norm.weight": (_hidden(base, prefix),)}
    if what == "gate":
        shapes |= {"head.weight": (1, _hidden(base, prefix)), "head.bias": (1,)}
    last = f"layers.{depth - 1}."
    optional = {n for n in shapes if n.startswith(last) and not is_used_in_last(n.removeprefix(last))}
    if not may_lack_unused or optional & set(names):
        optional = set()
    found = {name: own.tensors[stored].shape for name, stored in names.items()}
    _check_tensors(found, shapes, f"{where}: the {what}", lambda name: names.get(name, name), optional)


def check_depth(shared: int, depth: int, layers: int, names: Iterable[str], *, where: str, what: str) -> None:
    """Refuse K and T (CheckpointError) that the base's layers, or the branch's tensors by our names, do not have."""
    if shared >= layers:
        raise CheckpointError(
            f"{where}: K={shared} shared layers leave nothing of the base's {layers} layers; "
            "the config does not belong to this base."
        )
    found = layer_count(names)
    if found != depth:
        raise CheckpointError(
            f"{where}: the config says T={depth} branch layers, but the {what} has {found} in the weights; "
            "use the config that came with the weights."
        )


def _check_tensors(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    where: str,
    stored: Callable[[str], str],
    optional: Set[str] = frozenset(),
) -> None:
    """Compare names and shapes of a branch's tensors with those that the base asks for; errors name the stored ones."""
    missing, unknown = sorted(set(wanted) - optional - set(found)), sorted(set(found) - set(wanted))
    if any(".experts.0." in name for name in missing) and any(".experts." in name for name in unknown):
        raise CheckpointError(
            f"{where} has its experts fused into one tensor per layer, but the base's files hold each one apart; use "
            "the adapter as it is, converting is not supported for this family."
        )
    if missing or unknown:
        kind, names = ("lacks", missing) if missing else ("has unknown", unknown)
        raise CheckpointError(f"{where} {kind} {listed([stored(n) for n in names])}; the weights do not fit this base.")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{where}: {stored(name)} has shape {shape}, but the base needs {wanted[name]}; "
                "the weights belong to another base model."
            )


def fill_last_layer(region: Mapping[str, str], base: WeightIndex, prefix: str, zoom: ZoomConfig) -> dict[str, str]:
    """What a merged checkpoint must hold although it is never used, taken from the layer that the branch began as.
    Returns merged name to base name; empty if nothing is missing."""
    depth = zoom.branch_layers
    start = min(zoom.shared_layers + depth, layer_count([n.removeprefix(prefix) for n in base.tensors])) - 1
    here = f"{prefix}layers.{start}."
    inner = sorted(name.removeprefix(here) for name in base.tensors if name.startswith(here))
    last = f"layers.{depth - 1}."
    return {f"{prefix}twig_{last}{name}": here + name for name in inner if last + name not in region}


def _expected(base: WeightIndex, prefix: str, shared: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a branch: those of the base layers that it began as, which need not be alike."""
    last = layer_count([n.removeprefix(prefix) for n in base.tensors if n.startswith(f"{prefix}layers.")]) - 1
    out: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        origin = f"{prefix}layers.{min(shared + i, last)}."
        inner = {n.removeprefix(origin): info.shape for n, info in base.tensors.items() if n.startswith(origin)}
        out |= {f"layers.{i}.{name}": shape for name, shape in inner.items()}
    return out


def _hidden(base: WeightIndex, prefix: str) -> int:
    return base.tensors[f"{prefix}layers.0.input_layernorm.weight"].shape[0]


_USED_IN_LAST = re.compile(r"(input_layernorm|self_attn\.(q_proj|k_proj|q_norm|k_norm))\.")
_NOT_IN_ANSWERS = ("decide_by", "answer_tokens", "gate_threshold", "presets", "provenance")
_LAYER = re.compile(r"layers\.(\d+)\.(.*)")

Tensors = Mapping[str, "Tensor"]


def is_used_in_last(name: str) -> bool:
    """Whether the region branch's last layer needs this parameter (a name within the layer)."""
    return _USED_IN_LAST.match(name) is not None


def region_digest(engine: Engine) -> str:
    """Sixteen hex digits of the region branch's weights that are used, whatever number format they were loaded in; ""
    without a branch."""
    if engine.region is None:
        return ""
    last = f"layers.{len(engine.region.layers) - 1}."
    weights = {
        name: weight
        for name, weight in engine.region.state_dict().items()
        if not name.startswith(last) or is_used_in_last(name.removeprefix(last))
    }
    return maps_digest(weights, weights.__getitem__)


def zoom_identity(engine: Engine) -> dict[str, Any]:
    """What decides an answer with the region beside the base's weights, as JSON values: the digest of the region branch
    and the config, without what only decides whether to zoom, and without its provenance."""
    config = {name: value for name, value in engine.config.to_dict().items() if name not in _NOT_IN_ANSWERS}
    return {"branch": region_digest(engine), "config": json.loads(json.dumps(config))}


def layer_count(names: Iterable[str]) -> int:
    """How many layers a branch's tensor names speak of."""
    found = [int(match[1]) for name in names if (match := _LAYER.match(name))]
    return max(found) + 1 if found else 0


def build_gate(
    backbone: Backbone, shared_layers: int, branch_layers: int, tensors: Tensors, *, where: str, prefix: str
) -> GateBranch:
    """The gate branch of a checkpoint.

    Args:
        backbone: gives the layer class, number format and device.
        prefix: what stands before the names in that file, for error texts.

    Raises:
        CheckpointError: wrong K or T, missing, unknown or misshapen tensors; it names them.
    """
    from qzoom.heads.branches import GateBranch

    _check_layers(backbone, shared_layers, branch_layers, tensors, where=where, what="gate")
    gate = GateBranch(_empty_layers(backbone, shared_layers, branch_layers), backbone.hidden_size)
    _place(gate, backbone)
    _fill(gate, tensors, where, lambda name: prefix + name)
    gate.eval().requires_grad_(False)
    return gate


def build_region(
    backbone: Backbone,
    shared_layers: int,
    branch_layers: int,
    tensors: Tensors,
    *,
    where: str,
    prefix: str,
    norm: bool = False,
) -> RegionBranch:
    """The region branch of a checkpoint; arguments and errors as `build_gate`.

    Args:
        norm: it has a norm of its own (`ZoomConfig.branch_norm`).

    The unused rest of the last layer stays absent when the checkpoint leaves it out.
    """
    from qzoom.heads.branches import RegionBranch

    _check_layers(backbone, shared_layers, branch_layers, tensors, where=where, what="region branch")
    own = copy.deepcopy(backbone.decoder.norm) if norm else None
    region = RegionBranch(_empty_layers(backbone, shared_layers, branch_layers), own)  # type: ignore[arg-type]
    last = f"layers.{branch_layers - 1}."
    inner = [name.removeprefix(last) for name in tensors if name.startswith(last)]
    if all(is_used_in_last(name) for name in inner):
        _drop_unused(region.layers[-1])
    _place(region, backbone)
    _fill(region, tensors, where, lambda name: prefix + name)
    region.eval().requires_grad_(False)
    return region


def _empty_layers(backbone: Backbone, shared_layers: int, branch_layers: int) -> nn.ModuleList:
    """Layers of the backbone's class to be filled; base layers past the end are never asked for."""
    from torch import nn

    last = backbone.num_layers - 1
    return nn.ModuleList(backbone.new_branch_layer(min(shared_layers + i, last)) for i in range(branch_layers))


def _place(branch: nn.Module, backbone: Backbone) -> None:
    """Where and as what a branch computes; a backbone without weights gives layers without values, to be filled."""
    if any(parameter.is_meta for parameter in branch.parameters()):
        branch.to(dtype=backbone.dtype).to_empty(device=backbone.device)
    else:
        branch.to(backbone.device, backbone.dtype)


def _check_layers(backbone: Backbone, shared: int, depth: int, names: Iterable[str], *, where: str, what: str) -> None:
    check_depth(shared, depth, backbone.num_layers, names, where=where, what=what)
    if len(backbone.attention_layers) < backbone.num_layers:
        try:
            backbone.check_depth(shared, depth)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error


def _drop_unused(module: nn.Module, path: str = "") -> None:
    """Take out of a layer all modules that hold only unused parameters."""
    for name, child in list(module.named_children()):
        inner = [f"{path}{name}.{parameter}" for parameter, _ in child.named_parameters()]
        if not any(is_used_in_last(parameter) for parameter in inner):
            setattr(module, name, None)
        else:
            _drop_unused(child, f"{path}{name}.")


def _fill(module: nn.Module, tensors: Tensors, where: str, stored: Callable[[str], str]) -> None:
    """Copy tensors in after checking names and shapes."""
    import torch

    wanted = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    _check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, where, stored)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    check_finite(wanted.items(), where, stored)
