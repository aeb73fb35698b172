"""`qzoom eval zoomgap`: what a model reads in the region but not in the whole picture, and what zooming makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli import options
from qzoom.cli.boxed_data import QUESTIONS, Data, Source, open_boxed
from qzoom.cli.console import Console
from qzoom.cli.eval import Count, DataRevision, Fresh, Limit, Seed, Split

if TYPE_CHECKING:
    from qzoom.data.samples import Task
    from qzoom.evaluation.zoom_views import GapSettings, View
    from qzoom.evaluation.zoomgap import ViewAnswers
    from qzoom.model import QZoom

__all__ = ["zoomgap"]

MaxVisualTokens = Annotated[
    int | None,
    typer.Option(
        min=2,
        show_default="what the checkpoint's two looks may spend together",
        help="Most visual tokens of a question, the same in every view; zooming shares them between its two looks.",
    ),
]
Views = Annotated[str, typer.Option(metavar="LIST", help="Which views to ask, separated by commas; full is a must.")]
CropScale = Annotated[
    str,
    typer.Option(
        metavar="S|fit|shipped",
        help="Enlarge the crop's sides by S; fit: until it fills --max-visual-tokens; shipped: the data's own crop.",
    ),
]
CropMargin = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=10,
        show_default="0.1; zoombench: 0",
        help="Added on every side of the region, as a share of its own side.",
    ),
]
CropMinPx = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="56; zoombench: 1",
        help="Least width and height of the region in original pixels; smaller ones grow about their centre.",
    ),
]
PlacesOf = Annotated[
    str,
    typer.Option(
        "--places",
        help="What the region holds of an answer's places: one, all, or auto: all for counts and sides, else one.",
    ),
]
BoxStyle = Annotated[str, typer.Option(help="How the boxed view marks the region: rectangle, ellipse or dim.")]
ZoomOf = Annotated[str, typer.Option("--zoom", help="The zoom view: auto asks the gate, always reads the region.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", show_default=False, help="Keep every answer in this folder; a rerun continues it."),
]
Rescore = Annotated[
    Path | None, typer.Option(show_default=False, help="Figures of a folder of kept answers again, no model needed.")
]
Compare = Annotated[
    Path | None,
    typer.Option(show_default=False, help="Folder of another run: differences to it, by pairs, with intervals."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]


def zoomgap(
    task: Source = QUESTIONS,
    data: Data = None,
    split: Split = None,
    data_revision: DataRevision = None,
    seed: Seed = None,
    count: Count = None,
    limit: Limit = None,
    model: options.Model = "tiny",
    views: Views = "full,region,boxed,zoom",
    max_visual_tokens: MaxVisualTokens = None,
    crop_scale: CropScale = "2",
    crop_margin: CropMargin = None,
    crop_min_px: CropMinPx = None,
    places: PlacesOf = "auto",
    box_style: BoxStyle = "rectangle",
    zoom: ZoomOf = "auto",
    output: Output = None,
    fresh: Fresh = False,
    rescore: Rescore = None,
    compare: Compare = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    max_new_tokens: MaxNewTokens = 128,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Measure the zooming gap: the same questions about the whole picture, its region, the marked picture, and zooming.

    The gap is the accuracy on the region less that on the whole picture, with a 95 % interval by pairs. Every view has
    the same words and the same visual tokens. A question that fails in a view is wrong there.

    Example: qzoom eval zoomgap --data receipts --split dev --json
    """
    from qzoom.evaluation.zoomgap import read_views

    console = Console(quiet=quiet)
    if rescore is not None:
        _show(read_views(rescore), compare, console, json)
        return
    if fresh and output is None:
        raise typer.BadParameter("--fresh needs --output.")
    tight = task == "zoombench"
    margin = crop_margin if crop_margin is not None else 0.0 if tight else 0.1
    least = crop_min_px or (1 if tight else 56)
    asked = _settings(views, max_visual_tokens, crop_scale, (margin, least), places, box_style, zoom, max_new_tokens)
    opened = open_boxed(task, data, split, data_revision, seed, count)
    if compare is not None:
        read_views(compare)
    console.hush_libraries()
    from qzoom.cli.loading import load_model

    reader = load_model(model, revision, device, dtype)
    settings = _for_model(reader, asked, max_visual_tokens, views, console)
    _show(_ask(reader, opened, settings, limit, output, fresh, console), compare, console, json)


def _settings(
    views: str,
    total: int | None,
    scale: str,
    around: tuple[float, int],
    places: Any,
    style: Any,
    zoom: Any,
    max_new_tokens: int,
) -> GapSettings:
    """The options, checked before anything is loaded.

    Raises:
        typer.BadParameter: a wrong call.
    """
    from qzoom.errors import ConfigError
    from qzoom.evaluation.zoom_views import GapSettings

    named: Any = tuple(word.strip() for word in views.split(","))
    try:
        factor: Any = scale if scale in ("fit", "shipped") else float(scale)
    except ValueError:
        factor = scale
    try:
        return GapSettings(named, total or 1024, factor, *around, places, style, zoom, max_new_tokens)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def _for_model(reader: QZoom, asked: GapSettings, total: int | None, views: str, console: Console) -> GapSettings:
    """The settings with the model's own limit where none was given, without zooming where it cannot zoom."""
    import dataclasses

    from qzoom.evaluation.zoom_views import VIEWS
    from qzoom.evaluation.zoomgap import default_limit

    kept = asked.views
    if not reader.has_region and views == ",".join(VIEWS):
        console.note("This model has no region branch, so the zoom view is left out.")
        kept = tuple(view for view in kept if view != "zoom")
    return dataclasses.replace(asked, views=kept, max_visual_tokens=total or default_limit(reader))


def _ask(
    reader: QZoom,
    opened: Task,
    settings: GapSettings,
    limit: int | None,
    output: Path | None,
    fresh: bool,
    console: Console,
) -> ViewAnswers:
    from contextlib import ExitStack

    from qzoom.cli.eval_output import progress
    from qzoom.evaluation.zoomgap import ask_views

    with ExitStack() as bars:

        def bar(view: View) -> Any:
            bars.pop_all().close()
            return bars.enter_context(progress(console, f"{opened.name}, {view} view"))

        return ask_views(reader, opened, settings, limit=limit, output=output, fresh=fresh, progress=bar)


def _show(kept: ViewAnswers, compare: Path | None, console: Console, json: bool) -> None:
    from qzoom.evaluation.tables import gap_comparison_lines, gap_lines
    from qzoom.evaluation.zoomgap import compare_gaps, measure_gap, read_views

    found = measure_gap(kept.rows, places=kept.about.get("places", "auto"))
    difference = None if compare is None else compare_gaps(kept.rows, read_views(compare).rows)
    if json:
        console.record(kept.about | found.to_dict() | ({} if difference is None else {"compare": difference}))
        return
    for line in gap_lines(found):
        console.result(line)
    for line in gap_comparison_lines(difference) if difference is not None else ():
        console.result(line)
