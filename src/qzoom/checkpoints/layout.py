"""Do branch tensors fit a base model? Answered from file headers alone, by comparing with the base's own layers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qzoom.checkpoints.heads import is_used_in_last, layer_count
from qzoom.checkpoints.weights import WeightIndex
from qzoom.config import ZoomConfig
from qzoom.errors import CheckpointError

__all__ = ["check_branch", "decoder_prefix", "fill_last_layer"]

_FIRST_NORM = re.compile(r"((?:.*\.)?)layers\.0\.input_layernorm\.weight")


def decoder_prefix(index: WeightIndex) -> str:
    """What stands before `layers.0` in the names of a base model's decoder, e.g. "model.language_model.".

    Raises:
        CheckpointError: no decoder layers.
    """
    for name in sorted(index.tensors):
        match = _FIRST_NORM.fullmatch(name)
        if match and "visual" not in name:
            return match[1]
    raise CheckpointError(f"{index.folder} holds no decoder layers; it is not the base model.")


def check_branch(
    own: WeightIndex,
    names: Mapping[str, str],
    base: WeightIndex,
    zoom: ZoomConfig,
    what: str,
    where: str,
    may_lack_unused: bool = False,
) -> None:
    """Compare a branch with the base's layers.

    Args:
        own: the branch's tensors.
        names: our name to the name in `own`.
        base: the base model's tensors.
        zoom: K and T.
        what: "gate" or "region branch".
        where: for error texts.
        may_lack_unused: the last layer may hold only what is used.

    Raises:
        CheckpointError: wrong K or T, missing, unknown or misshapen tensors; it names them.
    """
    prefix, depth = decoder_prefix(base), zoom.branch_layers
    layers = layer_count([name.removeprefix(prefix) for name in base.tensors if name.startswith(f"{prefix}layers.")])
    if zoom.shared_layers >= layers:
        raise CheckpointError(f"{where}: K={zoom.shared_layers} leaves nothing of the base's {layers} layers.")
    if layer_count(list(names)) != depth:
        raise CheckpointError(
            f"{where}: the config says T={depth} branch layers, but the {what} has {layer_count(list(names))} in the "
            "weights; use the config that came with the weights."
        )
    shapes = _expected(base, prefix, depth)
    if what == "gate":
        shapes |= {"head.weight": (1, _hidden(base, prefix)), "head.bias": (1,)}
    last = f"layers.{depth - 1}."
    optional = {n for n in shapes if n.startswith(last) and not is_used_in_last(n.removeprefix(last))}
    if not may_lack_unused or optional & set(names):
        optional = set()
    missing, unknown = sorted(set(shapes) - optional - set(names)), sorted(set(names) - set(shapes))
    if missing or unknown:
        said = f"lacks {', '.join(missing[:4])}" if missing else f"has unknown {', '.join(unknown[:4])}"
        raise CheckpointError(f"{where}: the {what} {said}; its weights do not fit this base model.")
    for name, stored in names.items():
        if own.tensors[stored].shape != shapes[name]:
            raise CheckpointError(
                f"{where}: {stored} has shape {own.tensors[stored].shape}, but the base needs {shapes[name]}; "
                "the weights belong to another base model."
            )


def fill_last_layer(region: Mapping[str, str], base: WeightIndex, prefix: str, zoom: ZoomConfig) -> dict[str, str]:
    """What a merged checkpoint must hold although it is never used, taken from the layer that the branch began as.

    Returns:
        Merged name to base name; empty if nothing is missing.
    """
    depth = zoom.branch_layers
    start = min(zoom.shared_layers + depth, layer_count([n.removeprefix(prefix) for n in base.tensors])) - 1
    here = f"{prefix}layers.{start}."
    inner = sorted(name.removeprefix(here) for name in base.tensors if name.startswith(here))
    last = f"layers.{depth - 1}."
    return {f"{prefix}twig_{last}{name}": here + name for name in inner if last + name not in region}


def _expected(base: WeightIndex, prefix: str, depth: int) -> dict[str, tuple[int, ...]]:
    first = f"{prefix}layers.0."
    inner = {n.removeprefix(first): base.tensors[n].shape for n in base.tensors if n.startswith(first)}
    return {f"layers.{i}.{name}": shape for i in range(depth) for name, shape in inner.items()}


def _hidden(base: WeightIndex, prefix: str) -> int:
    return base.tensors[f"{prefix}layers.0.input_layernorm.weight"].shape[0]
