"""`qzoom ask` and `qzoom perceive`: a question about pictures, and the answer or the regions on the screen."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.console import Console
from qzoom.cli.flags import Flags, build_settings, flatten
from qzoom.cli.options import (
    Inputs,
    LookOptions,
    ModelOptions,
    OutputOptions,
    Pages,
    RegionTokens,
    parse_tokens,
    read_pictures,
    split_inputs,
)
from qzoom.errors import DataError
from qzoom.types import Answer, GateDecision, Perception, Region, SamplingParams, StreamEvent, Usage

if TYPE_CHECKING:
    from qzoom.model import QZoom


@flatten
def ask(
    inputs: Inputs,
    *,
    model: ModelOptions,
    look: LookOptions,
    out: OutputOptions,
    pages: Pages = "",
    save: Annotated[
        Path | None,
        typer.Option(help="Draw image, region and answer into this file; the extension selects the format."),
    ] = None,
    region_tokens: RegionTokens = None,
    sampling: Annotated[
        dict[str, Any],
        Flags(
            "QZOOM_ASK_",
            ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop"),
            recipe=False,
            of=SamplingParams,
        ),
    ],
) -> None:
    """Ask a question about an image.

    The coarse pass comes first; if the gate finds it not enough, the region that the question asks about is read
    at high resolution. On a terminal the answer appears as it is generated; a file or pipe gets its text only.
    Of a PDF, all pages are looked at, as they are drawn; text layers are not read.

    Example: qzoom ask receipt.jpg "What is the total amount?" --save answer.png
    """
    build_settings(SamplingParams, sampling)
    settings: dict[str, Any] = sampling | {
        "zoom": look.zoom,
        "coarse_tokens": look.coarse(),
        "region_tokens": parse_tokens(region_tokens, "--region-tokens"),
    }
    console = out.console
    if save is not None:
        _check_save(save, inputs[:-1])
    reader, images, question = _open(inputs, model, look, console, pages)
    settings |= look.thresholds(reader)
    streamed = console.live and not out.json
    if streamed:
        answer = _show(reader.stream(images, question, **settings), console)
    else:
        answer = reader.ask(images, question, **settings)
        _explain(answer, console)
    for note in answer.notes:
        console.note(f"note    {note}")
    full = count_full_tokens(answer.image_sizes_px, answer.cell_px)
    console.note(describe_cost(answer.usage, answer.timing_ms, full))
    if out.json:
        console.record(answer.to_dict())
    elif not streamed:
        console.result(answer.text)
    if save is not None:
        from qzoom.plots.answer import save_plot

        plain = reader.ask(images, question, **(settings | {"zoom": "never"})).text if answer.gate.zoomed else None
        console.note(f"saved   {save_plot(answer, save, coarse_text=plain)}")


@flatten
def perceive(
    inputs: Inputs,
    *,
    model: ModelOptions,
    look: LookOptions,
    out: OutputOptions,
    pages: Pages = "",
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Add the region map to the JSON line.")] = False,
) -> None:
    """Print the gate's score and the regions for a question, without an answer.

    Regions are printed whatever the gate decides, in pixels of the original image.

    Example: qzoom perceive receipt.jpg "What is the total amount?" --json
    """
    if heatmap and not out.json:
        raise typer.BadParameter("--heatmap needs --json.")
    console = out.console
    coarse = look.coarse()
    reader, images, question = _open(inputs, model, look, console, pages)
    perception = reader.perceive(images, question, zoom=look.zoom, coarse_tokens=coarse, **look.thresholds(reader))
    console.note(describe_cost(perception.usage, perception.timing_ms))
    if out.json:
        console.record(perception.to_dict(heat_map=heatmap))
        return
    console.result(describe_gate(perception.gate))
    for line in describe_regions(perception.regions, perception.image_sizes_px):
        console.result(line)


def _open(
    inputs: list[str], model: ModelOptions, look: LookOptions, console: Console, pages: str
) -> tuple[QZoom, list[Any], str]:
    """The model, the pictures and the question; pictures are read first, so that a wrong path is reported at once."""
    pictures, question = split_inputs(inputs)
    images = read_pictures(pictures, pages)
    with console.waiting(f"loading {model.model} ..."):
        console.hush_libraries()
        return look.configured(model.load()), images, question


def _check_save(path: Path, pictures: Sequence[str]) -> None:
    """Refuse a file that cannot be written, or that is one of the pictures, before the model is loaded."""
    from qzoom.plots.answer import check_plot_path

    try:
        check_plot_path(path)
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="--save") from error
    if path.is_file() and any(os.path.isfile(name) and path.samefile(name) for name in pictures):
        raise typer.BadParameter(f"{path} is the picture itself; name another file.", param_hint="--save")


def _show(events: Iterator[StreamEvent], console: Console) -> Answer:
    """Print a streamed answer as it comes; returns the whole."""
    answer = None
    for event in events:
        if event.kind == "perception" and event.perception is not None:
            _explain(event.perception, console)
        elif event.kind == "text":
            console.write(event.text)
        elif event.kind == "answer":
            answer = event.answer
    console.write("\n")
    if answer is None:
        raise RuntimeError("the stream ended without an answer")
    for line in describe_regions([region for region in answer.regions if region.reread], answer.image_sizes_px):
        console.note(line)
    return answer


def _explain(seen: Answer | Perception, console: Console) -> None:
    """The gate's line and those of the regions."""
    console.note(describe_gate(seen.gate))
    if seen.gate.zoomed:
        for line in describe_regions(seen.regions, seen.image_sizes_px):
            console.note(line)


def count_full_tokens(sizes_px: Sequence[tuple[int, int]], cell_px: int) -> int:
    """Visual tokens of pictures at native resolution; 0 if `cell_px`, the pixels per side of a token, is unknown.

    Native means every pixel, unscaled and uncapped, even where the model's own processor would shrink the picture.
    """
    if not cell_px:
        return 0
    return sum(max(1, round(width / cell_px)) * max(1, round(height / cell_px)) for width, height in sizes_px)


def describe_gate(gate: GateDecision) -> str:
    """Score, threshold and decision on one line."""
    decision = "zooms in" if gate.zoomed else "the coarse view is enough"
    if gate.note:
        decision = gate.note
    if gate.score is None or gate.threshold is None:
        return f"gate    not asked: {decision}" if gate.note or gate.zoomed else "gate    not asked"
    score, threshold = gate.figures()
    return f"gate    {score} (zooms from {threshold}): {decision}"


def describe_regions(regions: Sequence[Region], sizes_px: Sequence[tuple[int, int]]) -> list[str]:
    """One line per region: where, how sure, and its share of the picture."""
    lines = []
    for region in regions:
        x0, y0, x1, y1 = region.box
        width, height = sizes_px[region.image]
        share = (x1 - x0) * (y1 - y0) / (width * height)
        where, points = f"picture {region.image + 1}, " if len(sizes_px) > 1 else "", ""
        if region.page is not None and region.box_pt is not None:
            where, points = f"page {region.page}, ", f" ({list(region.box_pt)} pt)"
        lines.append(
            f"{'reread' if region.reread else 'region'}  {where}[{x0}, {y0}, {x1}, {y1}] px{points}, "
            f"score {region.score:.3f}, {share:.1%} of the picture"
        )
    return lines


def describe_cost(usage: Usage, timing_ms: dict[str, float], full_tokens: int = 0) -> str:
    """Tokens and times on one line. `timing_ms`: milliseconds per step, "total" among them. `full_tokens`: visual
    tokens of the pictures at native resolution (`count_full_tokens`); 0 if not known."""
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
