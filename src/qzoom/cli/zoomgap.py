"""`qzoom eval zoomgap` and `qzoom eval coverage`: measures that need questions with known answer boxes."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qzoom.cli.console import Console
from qzoom.cli.eval import DataOptions
from qzoom.cli.flags import Flags, build_settings, flatten, optional
from qzoom.cli.options import Fresh, ModelOptions, OutputOptions
from qzoom.data.samples import Task
from qzoom.errors import DataError
from qzoom.evaluation.zoom_views import VIEWS, GapSettings, View

if TYPE_CHECKING:
    from qzoom.config import TokenBudget
    from qzoom.evaluation.coverage import Coverage
    from qzoom.evaluation.zoomgap import ViewAnswers
    from qzoom.model import QZoom

QUESTIONS = "questions"

Source = Annotated[
    str,
    typer.Argument(
        metavar="[TASK]",
        help="questions (any question file with boxes, such as the receipts), documents, scenes or zoombench.",
    ),
]
Compare = Annotated[Path | None, optional("Folder of another run to compare with: paired differences with intervals.")]


@flatten
def zoomgap(
    task: Source = QUESTIONS,
    *,
    data: DataOptions,
    model: ModelOptions,
    views: Annotated[dict[str, Any], Flags("QZOOM_EVAL_ZOOMGAP_", recipe=False, of=GapSettings)],
    output: Annotated[
        Path | None, optional("Store every answer in this folder; a rerun resumes.", "--output", "-o")
    ] = None,
    fresh: Fresh = False,
    rescore: Annotated[
        Path | None, optional("Compute the figures of a folder of stored answers, without a model.")
    ] = None,
    compare: Compare = None,
    out: OutputOptions,
) -> None:
    """Measure the zooming gap: questions about the whole image, the region, the marked image, and with zooming.

    The gap is the accuracy on the region minus that on the whole image, with a paired 95 % interval. Every view has the
    same prompt and the same number of visual tokens, by default the checkpoint's. A question that fails in a view
    counts as wrong there. For zoombench the crop has no margin and no minimum size unless they are given.

    Example: qzoom eval zoomgap --data receipts --split dev --json
    """
    from qzoom.evaluation.comparable import check_gaps
    from qzoom.evaluation.zoomgap import ask_views, default_limit, read_views

    console = out.console
    if rescore is not None:
        data.refuse_with_rescore(output, fresh=fresh)
        if views:
            raise typer.BadParameter("--rescore reads stored answers and asks nothing; leave settings of views out.")
        other = None if compare is None else read_views(compare)
        _print_gap(read_views(rescore), other, console, json=out.json)
        return
    if fresh and output is None:
        raise typer.BadParameter("--fresh needs --output.")
    tight = {"crop_margin": 0.0, "crop_min_px": 1} if task == "zoombench" else {}
    settings = build_settings(GapSettings, tight | views)
    opened = _open_boxed(task, data)
    other = None if compare is None else read_views(compare)
    console.hush_libraries()
    reader = model.load()
    if not reader.has_region and "views" not in views:
        console.note("This model has no region branch, so the zoom view is left out.")
        settings = dataclasses.replace(settings, views=tuple(view for view in VIEWS if view != "zoom"))
    if "max_visual_tokens" not in views:
        settings = dataclasses.replace(settings, max_visual_tokens=default_limit(reader))
    if other is not None:
        check_gaps(opened.identity | settings.to_dict(), other[1])  # before anything is asked
    with ExitStack() as bars:

        def bar(view: View) -> Any:
            bars.pop_all().close()
            return bars.enter_context(console.progress(f"{opened.name}, {view} view, pictures"))[0]

        answers = ask_views(reader, opened, settings, limit=data.limit, output=output, fresh=fresh, progress=bar)
    _print_gap(answers, other, console, json=out.json)


def _print_gap(answers: ViewAnswers, other: ViewAnswers | None, console: Console, *, json: bool) -> None:
    from qzoom.evaluation.comparable import check_gaps
    from qzoom.evaluation.tables import gap_comparison_lines, gap_lines
    from qzoom.evaluation.zoomgap import compare_gaps, measure_gap

    rows, about = answers
    figures = measure_gap(rows, places=about.get("places", "auto"))
    difference = None
    if other is not None:
        if note := check_gaps(about, other[1]):
            console.note(note)
        difference = compare_gaps(rows, other[0])
    if json:
        console.record(about | figures | ({} if difference is None else {"compare": difference}))
        return
    for line in gap_lines(figures):
        console.result(line)
    for line in gap_comparison_lines(difference) if difference is not None else ():
        console.result(line)


@flatten
def coverage(
    task: Source = QUESTIONS,
    *,
    data: DataOptions,
    model: ModelOptions,
    max_visual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="the checkpoint's coarse pass",
            help="Maximum number of visual tokens of the coarse view.",
        ),
    ] = None,
    output: Annotated[
        Path | None, optional("Folder for coverage.json (with every question) and the plot.", "--output", "-o")
    ] = None,
    compare: Compare = None,
    out: OutputOptions,
) -> None:
    """Measure how much attention falls on the answer box.

    The question's attention is divided by that of a request to describe the image. Lift is the share of it inside the
    answer box, divided by the box's share of the image; 1 is chance. Layer and head are selected on half of the images
    and reported on the other half.

    Example: qzoom eval coverage scenes --count 20 -o out/coverage
    """
    from qzoom.engine.request import share_tokens
    from qzoom.evaluation.comparable import check_coverage
    from qzoom.evaluation.coverage import compare_coverage, read_coverage
    from qzoom.evaluation.tables import coverage_lines

    console = out.console
    opened = _open_boxed(task, data)
    other = None if compare is None else read_coverage(compare)
    if output is not None:
        _make_folder(output)  # before anything is asked
    console.hush_libraries()
    reader = model.load()
    looks, _ = share_tokens("never", reader.config, reader.engine.backbone.default_budget(), total=max_visual_tokens)
    most = None if looks is None else looks.max_tokens
    about = opened.identity | {"model": reader.name, "max_visual_tokens": most}
    if other is not None and (note := check_coverage(about, other, opened.identity)):
        console.note(note)
    figures = _measure(reader, opened, looks, data.limit, console)
    difference = None if other is None else compare_coverage(figures.to_dict(), other)
    if out.json:
        extra = {} if difference is None else {"compare": difference}
        console.record(about | figures.to_dict(rows=False) | extra)
    else:
        for line in coverage_lines(figures, difference):
            console.result(line)
    if output is not None:
        _write(figures, about, output, console)


def _measure(reader: QZoom, opened: Task, coarse: TokenBudget | None, limit: int | None, console: Console) -> Coverage:
    from qzoom.evaluation.coverage import measure_coverage, question_maps

    with console.progress(f"{opened.name}, attention, pictures") as (update,):
        figures = measure_coverage(question_maps(reader, opened, coarse, limit=limit, on_picture=update))
    if figures.errors:
        console.note(f"{figures.errors} questions could not be asked and are in no figure.")
    return figures


def _make_folder(folder: Path) -> None:
    """Make the folder of the figures (typer.BadParameter: a file; DataError: it cannot be made or written to)."""
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file; name a folder.", param_hint="--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror or error}); name another folder.") from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"{folder} cannot be written to; name another folder, or change its rights.")


def _write(figures: Coverage, about: dict[str, Any], folder: Path, console: Console) -> None:
    import json

    from qzoom.evaluation.tables import plot_coverage
    from qzoom.store.log import write_atomic

    text = json.dumps(about | figures.to_dict(), ensure_ascii=False, allow_nan=False)
    write_atomic(folder / "coverage.json", text + "\n")
    console.note(f"saved   {plot_coverage(figures, folder / 'coverage.png')}")


def _open_boxed(name: str, data: DataOptions) -> Task:
    """The questions of a task with boxes, checked."""
    from qzoom.data.questions import DRAWN, read_receipt_questions, task_folder

    if name not in (QUESTIONS, "receipts", "zoombench", *DRAWN):
        raise typer.BadParameter(
            f"No task with boxes is called {name!r}; known: questions, documents, scenes, zoombench."
        )
    useless = data.for_files() if name in DRAWN else data.for_synthetic()
    if name != "zoombench":
        useless |= {"--data-revision": data.data_revision}
    for flag, value in useless.items():
        if value is not None:
            raise typer.BadParameter(f"{flag} has no meaning for the task {name}; leave it out.")
    if name in (QUESTIONS, "receipts"):
        if data.data is None:
            raise typer.BadParameter("name the folder that holds the question file with --data.")
        return read_receipt_questions(task_folder(data.data, name), data.split or "dev")
    return data.open(name)
