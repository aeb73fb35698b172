"""What trains in which stage: one table.

    part       regions  answers  refit  gate        saved as
    vision        .        .       .      .         the base, never written by stages that leave it alone
    embedding     .        .*      .      .
    layers        .        x       .      .         answers: the merged model, or LoRA matrices in the adapter
    norm          .        x       .      .
    lm_head       .        x       .      .
    region        x        .       x      .         the adapter
    gate          .        .       .      x         the adapter

    * where it is the same tensor as lm_head, it moves with it.

Of the region branch's last layer only the input norm, the queries and the keys run (method.md 3); the rest of that
layer never trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qzoom.checkpoints.heads import is_used_in_last
from qzoom.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from qzoom.engine.state import Engine

__all__ = ["PARTS", "STAGES", "StageSpec", "named_parts", "select"]

Part = Literal["vision", "embedding", "layers", "norm", "lm_head", "region", "gate"]
PARTS: tuple[Part, ...] = ("vision", "embedding", "layers", "norm", "lm_head", "region", "gate")


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage.

    Args:
        trains: parts whose weights move.
        saves: "adapter" (branches beside a reference to the base) or "model" (everything; with LoRA an adapter that has
            the matrices too).
        needs: branches that must be there before; a missing one that trains is made from the base's layers.
    """

    trains: tuple[Part, ...]
    saves: Literal["adapter", "model"]
    needs: tuple[Part, ...] = ()


STAGES: dict[str, StageSpec] = {
    "regions": StageSpec(("region",), "adapter"),
    "answers": StageSpec(("layers", "norm", "lm_head"), "model", needs=("region",)),
    "refit": StageSpec(("region",), "adapter", needs=("region",)),
    "gate": StageSpec(("gate",), "adapter", needs=("region",)),
}


def named_parts(engine: Engine) -> dict[str, tuple[Part, nn.Parameter]]:
    """Every weight by a name that starts with its part. Weights that are one tensor have one name."""
    model, decoder = engine.backbone.model, engine.backbone.decoder
    groups: list[tuple[Part, nn.Module | None]] = [
        ("lm_head", model.lm_head),
        ("layers", engine.backbone.layers),
        ("norm", decoder.norm),  # type: ignore[list-item]
        ("embedding", engine.backbone.embedding),
        ("region", engine.region),
        ("gate", engine.gate),
    ]
    out: dict[str, tuple[Part, nn.Parameter]] = {}
    seen: set[int] = set()
    for part, module in groups:
        for name, weight in module.named_parameters() if module is not None else ():
            if id(weight) not in seen:
                seen.add(id(weight))
                out[f"{part}.{name}"] = (part, weight)
    for name, weight in model.named_parameters():
        if id(weight) not in seen:
            seen.add(id(weight))
            out[f"vision.{name}"] = ("vision", weight)
    return out


def select(engine: Engine, stage: str) -> dict[str, nn.Parameter]:
    """Freeze everything but what a stage trains.

    Args:
        engine: with the branches that the stage needs.
        stage: a key of `STAGES`.

    Returns:
        The weights that train, by name.

    Raises:
        ConfigError: a branch is missing.
    """
    spec = STAGES[stage]
    for part in ("region", "gate"):
        if part in (*spec.needs, *spec.trains) and getattr(engine, part) is None:
            raise ConfigError(f"The stage {stage!r} needs a model with a {part} branch; run the earlier stages first.")
    trained: dict[str, nn.Parameter] = {}
    last = f"region.layers.{len(engine.region.layers) - 1}." if engine.region is not None else "-"
    for name, (part, weight) in named_parts(engine).items():
        idle = name.startswith(last) and not is_used_in_last(name.removeprefix(last))
        moves = part in spec.trains and not idle
        weight.requires_grad_(moves)
        if moves:
            trained[name] = weight
    return trained
