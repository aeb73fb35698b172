"""Records in words: the few lines that a person sees beside an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qzoom.types import GateDecision, Region, Usage

__all__ = ["count_full_tokens", "describe_cost", "describe_gate", "describe_regions"]


def count_full_tokens(sizes_px: Sequence[tuple[int, int]], cell_px: int) -> int:
    """Visual tokens of pictures at native resolution; 0 if `cell_px`, the pixels per side of a token, is unknown.

    Native means every pixel, unscaled and uncapped, even where the model's own processor would shrink the picture.
    """
    if not cell_px:
        return 0
    return sum(max(1, round(width / cell_px)) * max(1, round(height / cell_px)) for width, height in sizes_px)


def describe_gate(gate: GateDecision) -> str:
    """Score, threshold and decision on one line."""
    decision = "zooms in" if gate.zoomed else "the coarse look is enough"
    if gate.note:
        decision = gate.note
    if gate.score is None or gate.threshold is None:
        return f"gate    not asked: {decision}" if gate.note or gate.zoomed else "gate    not asked"
    return f"gate    {gate.score:.3f} (zooms from {gate.threshold:.3f}): {decision}"


def describe_regions(regions: Sequence[Region], sizes_px: Sequence[tuple[int, int]]) -> list[str]:
    """One line per region: where, how sure, and its share of the picture."""
    lines = []
    for region in regions:
        x0, y0, x1, y1 = region.box
        width, height = sizes_px[region.image]
        share = (x1 - x0) * (y1 - y0) / (width * height)
        where = f"picture {region.image + 1}, " if len(sizes_px) > 1 else ""
        lines.append(
            f"region  {where}[{x0}, {y0}, {x1}, {y1}] px, score {region.score:.3f}, {share:.1%} of the picture"
        )
    return lines


def describe_cost(usage: Usage, timing_ms: dict[str, float], full_tokens: int = 0) -> str:
    """Tokens and times on one line.

    Args:
        usage: tokens paid.
        timing_ms: milliseconds per step, "total" among them.
        full_tokens: visual tokens of the pictures at native resolution (`count_full_tokens`); 0 if not known.
    """
    tokens = f"{usage.coarse_tokens} coarse + {usage.region_tokens} region visual tokens"
    paid = usage.coarse_tokens + usage.region_tokens
    if paid < full_tokens:
        tokens += f" ({1 - paid / full_tokens:.0%} saved of {full_tokens} at native resolution)"
    if usage.completion_tokens:
        tokens += f", {usage.completion_tokens} generated"
    if usage.reused_tokens:
        tokens += f", {usage.reused_tokens} reused"
    total = timing_ms.get("total")
    steps = [f"{name} {ms:.0f}" for name, ms in timing_ms.items() if name != "total" and ms >= 0.5]
    if total is None:
        return f"cost    {tokens}; ms: {', '.join(steps)}" if steps else f"cost    {tokens}"
    return f"cost    {tokens}; {total / 1000:.2f} s (ms: {', '.join(steps)})"
