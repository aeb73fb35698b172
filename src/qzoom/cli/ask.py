"""`qzoom ask`: a question about one or more pictures, from the command line to the answer on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.console import Console
from qzoom.cli.describe import count_full_tokens, describe_cost, describe_gate, describe_regions

if TYPE_CHECKING:
    from qzoom.types import Answer, Perception, StreamEvent

__all__ = ["ask"]


Save = Annotated[
    Path | None, typer.Option(help="Draw where it looked and what it answered; the ending chooses the format.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from this share of the likeliest tokens, above 0 to 1.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0 is all.")]
Seed = Annotated[int | None, typer.Option(show_default=False, help="Makes sampling repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option(show_default=False, help="Text that ends the answer; may be given again.")
]


def ask(
    inputs: options.Inputs,
    model: options.Model = "tiny",
    zoom: options.Zoom = "auto",
    save: Save = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    coarse_tokens: options.CoarseTokens = None,
    region_tokens: options.RegionTokens = None,
    gate_threshold: options.GateThreshold = None,
    region_threshold: options.RegionThreshold = None,
    preset: options.Preset = None,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Ask a question about a picture.

    The coarse look comes first; when the gate finds it wanting, the region that the question is about is read at high
    resolution. On a terminal the answer appears as it is made; into a file or pipe goes only its text.

    Example: qzoom ask receipt.jpg "What is the total amount?" --save answer.png
    """
    settings: dict[str, Any] = {
        "zoom": zoom,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": tuple(stop or ()),
        "coarse_tokens": options.parse_tokens(coarse_tokens, "--coarse-tokens"),
        "region_tokens": options.parse_tokens(region_tokens, "--region-tokens"),
    }
    source = (model, revision, device, dtype)
    _answer(inputs, source, (preset, gate_threshold, region_threshold), settings, save, json, Console(quiet=quiet))


def _answer(
    inputs: list[str],
    source: tuple[str, str | None, str, str],
    limits: tuple[str | None, float | None, float | None],
    settings: dict[str, Any],
    save: Path | None,
    json: bool,
    console: Console,
) -> None:
    """Read the pictures, load the model, ask, and say everything in its place."""
    from qzoom.cli.loading import load_model, read_pictures, thresholds

    pictures, question = options.split_inputs(inputs)
    images = read_pictures(pictures)
    with console.waiting(f"loading {source[0]} ..."):
        console.hush_libraries()
        reader = load_model(*source)
    settings["gate_threshold"], settings["region_threshold"] = thresholds(reader, *limits)
    streamed = console.live and not json
    if streamed:
        answer = _show(reader.stream(images, question, **settings), console)
    else:
        answer = reader.ask(images, question, **settings)
        _explain(answer, console)
    written = None
    if save is not None:
        plain = reader.ask(images, question, **(settings | {"zoom": "never"})).text if answer.gate.zoomed else None
        written = _draw(answer, save, plain)
    for note in answer.notes:
        console.note(f"note    {note}")
    full = count_full_tokens(answer.image_sizes_px, answer.cell_px)
    console.note(describe_cost(answer.usage, answer.timing_ms, full))
    if written is not None:
        console.note(f"saved   {written}")
    if json:
        console.record(answer.to_dict())
    elif not streamed:
        console.result(answer.text)


def _draw(answer: Answer, path: Path, coarse_text: str | None) -> Path:
    """Write the figure of an answer, beside what the coarse look alone would have said."""
    from qzoom.plots.answer import save_plot

    path.parent.mkdir(parents=True, exist_ok=True)
    return save_plot(answer, path, coarse_text=coarse_text)


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
    return answer


def _explain(seen: Answer | Perception, console: Console) -> None:
    """The gate's line and those of the regions."""
    console.note(describe_gate(seen.gate))
    if seen.gate.zoomed:
        for line in describe_regions(seen.regions, seen.image_sizes_px):
            console.note(line)
