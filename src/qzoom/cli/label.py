"""`qzoom label`: training labels from the model's own answers, kept so that a stopped run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qzoom.cli import options
from qzoom.cli.console import Console

if TYPE_CHECKING:
    from qzoom.data.questions import QuestionSet
    from qzoom.labels.label_regions import RegionRun
    from qzoom.labels.workers import ModelChoice

__all__ = ["app", "make_choice", "progress", "read_question_sets"]

app = typer.Typer(help="Make training labels from the model's own answers.", no_args_is_help=True)

Questions = Annotated[
    list[str],
    typer.Option(
        "--questions",
        help="JSONL file; or documents:FIRST:COUNT, scenes:FIRST:COUNT, receipts:FOLDER:SPLIT. May be repeated.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the records; a rerun continues it.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and count lines that cannot be used.")]
Processes = Annotated[int, typer.Option(min=1, help="How many processes label at once.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start the output anew.")]
Seed = Annotated[int, typer.Option(min=0, help="Which questions about drawn pictures are asked, and what is drawn.")]
PerPicture = Annotated[int, typer.Option(min=1, help="Most questions about a drawn picture.")]
Images = Annotated[str, typer.Option(help="Folder of the pictures, when they have moved.", show_default=False)]


Heads = Annotated[
    str, typer.Option(help="auto (found on drawn pictures), preset (the authors' tables), or '22:1,4 23:6,11'.")
]
SinkHeads = Annotated[str, typer.Option(help="Heads that show sinks, written likewise.", show_default=False)]
Sinks = Annotated[
    Literal["norm", "heads", "none"], typer.Option(help="What finds sinks: hidden-state norms, heads, or nothing.")
]
View = Annotated[Literal["dynamic", "square"], typer.Option(help="The picture as it is, or padded to a square.")]
Tokens = Annotated[int, typer.Option(min=4, help="Visual tokens of the look.")]
Longest = Annotated[int, typer.Option(min=2, help="Longest answer.")]
Foreground = Annotated[float, typer.Option(min=0, max=1, help="Share of the peak that is foreground.")]
Background = Annotated[float, typer.Option(min=0, max=1, help="Share of the peak below which is background.")]
MinPeak = Annotated[float, typer.Option(min=0, max=1, help="Maps whose peak is lower are left out.")]
BoxPrompt = Annotated[bool, typer.Option(help="Ask for the box too in natural pictures.")]
ProbePictures = Annotated[int, typer.Option(min=1, help="Drawn pictures that heads are found on.")]
HeadCount = Annotated[int, typer.Option(min=1, help="How many heads are taken of those found.")]


@app.callback()
def _group() -> None:
    """Make training labels from the model's own answers."""


@app.command("regions")
def regions(
    questions: Questions,
    output: Output,
    model: options.Model = "tiny",
    heads: Heads = "auto",
    sink_heads: SinkHeads = "",
    sinks: Sinks = "norm",
    view: View = "dynamic",
    tokens: Tokens = 576,
    max_new_tokens: Longest = 128,
    foreground: Foreground = 0.25,
    background: Background = 0.05,
    min_peak: MinPeak = 5e-3,
    box_prompt: BoxPrompt = True,
    probe_pictures: ProbePictures = 40,
    head_count: HeadCount = 3,
    per_picture: PerPicture = 4,
    images: Images = "",
    skip_bad: SkipBad = False,
    processes: Processes = 1,
    seed: Seed = 0,
    fresh: Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Label where the model's own answers look (stage 1); `qzoom train regions` learns from it.

    Example: qzoom label regions --model tiny --questions my.jsonl -o labels/regions
    """
    from qzoom.labels.find_heads import HeadSearch
    from qzoom.labels.label_regions import RegionRun
    from qzoom.labels.maps import RegionLabelSettings

    console = Console(quiet=quiet)
    found = read_question_sets(questions, skip_bad, per_picture, seed, console)
    tristate = RegionLabelSettings(foreground=foreground, background=background, min_peak=min_peak)
    by: Sinks = "heads" if sink_heads else sinks
    run = RegionRun({}, view, tokens, max_new_tokens, by, box_prompt=box_prompt, tristate=tristate, images=images)
    search = HeadSearch(probe_pictures, 4, head_count, tokens, min(32, max_new_tokens), view)
    how = {"heads": heads, "sinks": sink_heads, "search": search, "seed": seed, "processes": processes, "fresh": fresh}
    _regions(make_choice(model, revision, device, dtype), found, output, run, how, console, json)


def _regions(
    choice: ModelChoice,
    found: QuestionSet,
    output: Path,
    run: RegionRun,
    how: dict[str, Any],
    console: Console,
    json: bool,
) -> None:
    """Label and say what came of it."""
    from dataclasses import asdict

    from qzoom.labels.label_regions import label_regions

    console.hush_libraries()
    with progress(console, "labels", len(found.questions)) as advance:
        report = label_regions(choice, found.questions, output, run, on_question=advance, **how)
    if json:
        console.record(asdict(report) | {"skipped_lines": len(found.skipped)})
        return
    share = "" if report.agreement is None else f", {report.agreement:.1%} of them on a known answer"
    console.result(f"{report.usable} of {report.maps} label maps usable{share}; records in {output}")
    if report.skipped:
        console.note(f"{report.skipped} questions left out; the first: {report.reasons[0]}")


@app.command("gate")
def gate(
    questions: Questions,
    output: Output,
    model: options.Model = "tiny",
    ladder: Annotated[
        str, typer.Option(metavar="N,N,...", help="Visual tokens of the rungs, rising.")
    ] = "64,128,256,512",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    per_picture: PerPicture = 4,
    images: Images = "",
    skip_bad: SkipBad = False,
    processes: Processes = 1,
    seed: Seed = 0,
    fresh: Fresh = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Answer each question once on every rung of a ladder of resolutions (stage 3); for `qzoom train gate`.

    Questions need known answers.

    Example: qzoom label gate --model tiny --questions my.jsonl -o labels/gate
    """
    from dataclasses import asdict

    from qzoom.labels.gate import GateRun, label_gate

    parts = ladder.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise typer.BadParameter(
            f"{ladder!r} is no list of visual tokens such as 64,128,256,512.", param_hint="--ladder"
        )
    run = GateRun(tuple(int(part) for part in parts), max_new_tokens, images)
    console = Console(quiet=quiet)
    found = read_question_sets(questions, skip_bad, per_picture, seed, console)
    console.hush_libraries()
    with progress(console, "ladders", len(found.questions)) as advance:
        report = label_gate(
            make_choice(model, revision, device, dtype),
            found.questions,
            output,
            run,
            seed=seed,
            processes=processes,
            fresh=fresh,
            on_question=advance,
        )
    if json:
        console.record(asdict(report) | {"skipped_lines": len(found.skipped)})
        return
    console.result(
        f"{report.ladders} ladders: {report.transitions} transitions, {report.easy} easy, {report.dropped} dropped; "
        f"records in {output}"
    )
    if report.skipped:
        console.note(f"{report.skipped} questions left out; the first: {report.reasons[0]}")


def read_question_sets(names: list[str], skip_bad: bool, per_picture: int, seed: int, console: Console) -> QuestionSet:
    """The questions of a command line; lines left out are said."""
    from qzoom.data.questions import open_questions

    found = open_questions(names, skip_bad=skip_bad, per_picture=per_picture, seed=seed)
    for _, reason in found.skipped[:5]:
        console.note(f"left out: {reason}")
    if len(found.skipped) > 5:
        console.note(f"left out: {len(found.skipped)} lines in all")
    return found


def make_choice(model: str, revision: str | None, device: str, dtype: str) -> ModelChoice:
    """The model of a command line; "auto" takes a GPU where there is one."""
    import torch

    from qzoom.labels.workers import ModelChoice

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return ModelChoice(model, revision, device, dtype)


@contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error when a person watches it; gives a function that advances it."""
    if console.quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    import rich.console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
        line = bar.add_task(name, total=total)
        yield lambda count: bar.advance(line, count)
