"""`qzoom perceive`: what the gate and the region branch see in a question, without an answer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console
from qzoom.cli.describe import describe_cost, describe_gate, describe_regions

__all__ = ["perceive"]


def perceive(
    inputs: options.Inputs,
    model: options.Model = "tiny",
    zoom: options.Zoom = "auto",
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Put the map itself into the JSON line.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    coarse_tokens: options.CoarseTokens = None,
    gate_threshold: options.GateThreshold = None,
    region_threshold: options.RegionThreshold = None,
    preset: options.Preset = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Say where a question would make it look, without answering.

    Regions are given whatever the gate says, in pixels of the original picture.

    Example: qzoom perceive receipt.jpg "What is the total amount?" --json
    """
    from qzoom.cli.loading import load_model, read_pictures, thresholds

    if heatmap and not json:
        raise typer.BadParameter("--heatmap needs --json.")
    console = Console(quiet=quiet)
    pictures, question = options.split_inputs(inputs)
    settings: dict[str, Any] = {
        "zoom": zoom,
        "coarse_tokens": options.parse_tokens(coarse_tokens, "--coarse-tokens"),
    }
    images = read_pictures(pictures)
    with console.waiting(f"loading {model} ..."):
        console.hush_libraries()
        reader = load_model(model, revision, device, dtype)
    settings["gate_threshold"], settings["region_threshold"] = thresholds(
        reader, preset, gate_threshold, region_threshold
    )
    seen = reader.perceive(images, question, **settings)
    console.note(describe_cost(seen.usage, seen.timing_ms))
    if json:
        console.record(seen.to_dict(heat_map=heatmap))
        return
    console.result(describe_gate(seen.gate))
    for line in describe_regions(seen.regions, seen.image_sizes_px):
        console.result(line)
